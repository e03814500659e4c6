"""Features by way of the cache: read where they are there, computed and kept where they are not."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from distill.probe.extraction import Extraction
from distill.probe.feature_cache import FeatureCache, encoder_key, rows_key
from distill.probe.feature_records import Features, Wanted, features_of, no_features, tensors_of
from distill.probe.features import Samples, extract_features
from distill.probe.ranks import from_first, is_first


def extract_cached(
    encoder: nn.Module,
    dataset: Samples,
    how: Extraction,
    wanted: Wanted,
    *,
    cache: FeatureCache,
    data: tuple[str, list[int]],
    name: str,
    console: Console | None,
) -> Features:
    """Return an encoder's features, read from the cache where they are there, and kept in it where not.

    Args:
        encoder: as for `extract`.
        dataset: as for `extract`.
        how: as for `extract`.
        wanted: what is kept.
        cache: where.
        data: fingerprint of the data set, and the rows that `dataset` takes of it.
        name: shown beside the progress bar and in errors.
        console: where it is drawn.

    Raises:
        ConfigError: as for `extract`, or the cache cannot be written.
        DataError: as for `extract`, or a cached file is damaged or of another encoder.
    """
    key = {
        **encoder_key(encoder),
        "data": data[0],
        "rows": rows_key(data[1]),
        "view": [how.img_size_px, "bicubic square"],
        "dtype": how.precision,
        "device": torch.device(how.device).type,
        "pool": how.pool,
        "layers": list(wanted.layers),
        "token_grids": [list(grid) for grid in wanted.token_grids],
        "tokens": [wanted.tokens_per_image, how.seed],
        "dense_grid": wanted.dense_grid,
    }
    found = cache.read(key) if is_first() else None
    if from_first(int(found is not None)):
        if console is not None and is_first():
            console.print(
                f"features of {name} from {cache.file_of(key)}", highlight=False, markup=False, soft_wrap=True
            )
        return features_of(found, wanted, int(found["num_bad"])) if found is not None else no_features(wanted)
    features = extract_features(encoder, dataset, how, wanted, name=name, console=console)
    if is_first():
        cache.write(key, tensors_of(features))
    return features
