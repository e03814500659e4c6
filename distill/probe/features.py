"""Frozen features of a data set: pooled vectors for classifiers, and patch tokens for fidelity and attention.

Legend: N images, T tokens an image, D the width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from distill.encoder import Encoder, Layer
from distill.errors import ConfigError, DataError, DistillError
from distill.probe.extraction import (
    Extraction,
    Pool,
    Precision,
    choose_device,
    layers_needed,
    pool_layer,
)
from distill.probe.feature_records import LAST, Features, Grid, Wanted, features_of, pooled_key, tokens_key
from distill.probe.ranks import agree, gather, rank_and_size, share_of, sum_over_ranks

__all__ = ["Features", "Grid", "Samples", "Wanted", "choose_device", "extract", "extract_features", "grid_of"]

MAX_BAD_FRACTION = 0.01
"""More undecodable images than this stop the probe: the score would be of another data set."""


class Samples(Protocol):
    """A map-style data set of `{"image": uint8 [3, S, S], "label": int, "domain": int, "row": int}`."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one sample; raises DataError when its image cannot be used."""
        ...


class _Tolerant(Dataset[dict[str, Any]]):
    """The data set with undecodable images turned into a message, so that one of them does not end the pass."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return dict(self._dataset[index])
        except DataError as error:
            return {"error": str(error)}


def _collate(samples: list[dict[str, Any]]) -> tuple[dict[str, Tensor] | None, list[str]]:
    good = [sample for sample in samples if "error" not in sample]
    return (default_collate(good) if good else None), [sample["error"] for sample in samples if "error" in sample]


def extract(
    encoder: nn.Module,
    dataset: Samples,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    num_workers: int = 0,
    pool: Pool = "mean",
    token_grids: Sequence[Grid] = (),
    tokens_per_image: int = 16,
    seed: int = 0,
    name: str = "encoder",
    console: Console | None = None,
    layers: Sequence[int] = (LAST,),
    dense_grid: Grid | None = None,
    img_size_px: int = 448,
) -> Features:
    """Run an encoder once over a data set and keep pooled features and tokens of its last hidden states.

    Args:
        encoder: offers `distill.encoder.Encoder`, weights loaded; set to eval mode and moved to `device`.
        dataset: the images, uint8; each encoder normalises for itself.
        batch_size: images a forward pass; fewer on a CPU, see `Extraction.images_per_pass`.
        device: where the encoder runs.
        precision: "bfloat16" runs the encoder under autocast, which one that fixes its own dtype ignores; features
            are kept in float32 either way.
        num_workers: processes that decode images; 0 decodes in this one.
        pool: "mean" over patch tokens, "prefix" for the first prefix token (the class token), or both side by side.
        token_grids: grids (rows, columns) to sample patch tokens on; patch maps are average-pooled down to each.
        tokens_per_image: patch tokens kept for each image and grid, fewer when the grid has fewer.
        seed: chooses the places of the tokens, the same for every encoder.
        name: shown beside the progress bar and in errors.
        console: where the progress bar is drawn.
        layers: hidden states to keep, counted from the end; the last one is kept always.
        dense_grid: grid on which all tokens of the last hidden state are kept besides; None keeps none.
        img_size_px: side of the images, which bounds the batch on a CPU.

    Returns:
        Under torch.distributed each process takes a share of the images, and the first gets all of them; the others
        get their own share.

    Raises:
        ConfigError: `pool` needs a prefix token and the encoder has none, a grid is finer than the encoder's, or it
            has no such layer.
        DataError: a feature is not finite, no image can be decoded, or more than 1 % cannot.
    """
    how = Extraction(batch_size, str(device), precision, num_workers, pool, img_size_px, seed)
    wanted = Wanted(tuple(sorted({LAST, *layers})), tuple(token_grids), tokens_per_image, dense_grid)
    return extract_features(encoder, dataset, how, wanted, name=name, console=console)


def extract_features(
    encoder: nn.Module,
    dataset: Samples,
    how: Extraction,
    wanted: Wanted,
    *,
    name: str = "encoder",
    console: Console | None = None,
) -> Features:
    """Do what `extract` says, with its arguments in two records."""
    contract = how.ready(encoder)
    if how.pool != "mean" and contract.num_prefix_tokens == 0:
        raise ConfigError(f"--pool {how.pool} needs a class token and {name} has none; use --pool mean.")
    depth = layers_needed(contract, wanted.layers)
    share = share_of(len(dataset))
    mine = dataset if len(share) == len(dataset) else cast(Samples, Subset(cast(Any, dataset), share))
    store = _Store(len(mine), name)
    try:
        _fill(store, contract, mine, how, wanted, depth, name, console)
    except DistillError as error:
        agree(str(error))
        raise
    agree(None)
    return store.features(wanted, len(dataset))


def _fill(
    store: _Store,
    contract: Encoder,
    dataset: Samples,
    how: Extraction,
    wanted: Wanted,
    depth: int,
    name: str,
    console: Console | None,
) -> None:
    batch_size = how.images_per_pass(how.img_size_px)
    loader = DataLoader(_Tolerant(dataset), batch_size=batch_size, num_workers=how.num_workers, collate_fn=_collate)
    with _progress(console) as progress:
        task = progress.add_task(f"features of {name}", total=len(dataset))
        for batch, errors in loader:
            store.note_bad(errors)
            if batch is not None:
                states = how.hidden_states(cast(nn.Module, contract), batch["image"], depth)
                kept = _kept(states, batch["row"], how, wanted)
                _require_finite(kept, batch["row"], name)
                store.append({**kept, **{key: batch[key] for key in ("label", "domain", "row")}})
            progress.advance(task, len(errors) + (0 if batch is None else len(batch["row"])))


def _kept(states: Sequence[Layer], rows: Tensor, how: Extraction, wanted: Wanted) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for layer in wanted.layers:
        kept[pooled_key(layer)] = pool_layer(states[layer], how.pool)
        for grid in wanted.token_grids:
            maps = _pooled_map(states[layer][1], grid)
            kept[tokens_key(layer, grid)] = _sample_tokens(maps, rows, wanted.tokens_per_image, how.seed)
    if wanted.dense_grid is not None:
        kept["dense"] = _pooled_map(states[LAST][1], wanted.dense_grid).flatten(1, 2)
    return kept


def grid_of(encoder: nn.Module, img_size_px: int, *, device: torch.device | str = "cpu") -> Grid:
    """Return the grid (rows, columns) of the encoder's last hidden state for square images of that size.

    Raises:
        ConfigError: the encoder cannot take images of that size.
    """
    contract = cast(Encoder, encoder.to(device).eval())
    image = torch.zeros(1, 3, img_size_px, img_size_px, dtype=torch.uint8, device=device)
    try:
        with torch.no_grad():
            patches = contract.forward_hidden_states(image, 1)[-1][1]
    except ValueError as error:
        raise ConfigError(f"The encoder refuses images of --img_size_px {img_size_px}: {error}") from error
    return int(patches.shape[1]), int(patches.shape[2])


class _Store:
    """Tensors that fill up batch by batch, allocated once, so that the peak is the result and one batch."""

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._filled = 0
        self._tensors: dict[str, Tensor] = {}
        self._num_bad = 0
        self._first_error = ""

    def note_bad(self, errors: list[str]) -> None:
        self._num_bad += len(errors)
        self._first_error = self._first_error or "".join(errors[:1])
        self._require_few(self._num_bad, self._size * rank_and_size()[1])

    def _require_few(self, num_bad: int, size: int) -> None:
        if num_bad > max(1, int(MAX_BAD_FRACTION * size)):
            raise DataError(
                f"{num_bad} of {size} images cannot be decoded; at most {MAX_BAD_FRACTION:.0%} (and one) may be left "
                f"out. The first: {self._first_error} Repair the data and index it again."
            )

    def append(self, batch: Mapping[str, Tensor]) -> None:
        stop = self._filled
        for key, value in batch.items():
            if key not in self._tensors:
                self._tensors[key] = torch.empty(self._size, *value.shape[1:], dtype=value.dtype)
            stop = self._filled + len(value)
            self._tensors[key][self._filled : stop] = value.cpu()
        self._filled = stop

    def features(self, wanted: Wanted, size: int) -> Features:
        """Gather what all processes have; a share without any image would have no shape, so it is refused."""
        empty = None if self._filled else f"No image could be decoded for {self._name}. {self._first_error}".rstrip()
        agree(empty)
        if empty is not None:
            raise DataError(
                f"{empty}{'' if self._first_error else ' The data set, or a process share of it, is empty.'}"
            )
        num_bad = sum_over_ranks(self._num_bad)
        self._require_few(num_bad, size)
        kept = gather({key: value[: self._filled] for key, value in self._tensors.items()})
        return features_of(kept, wanted, num_bad)


def _pooled_map(patches: Tensor, grid: Grid) -> Tensor:
    """Patch map `[B, h, w, D]`, float32, averaged down to `grid`."""
    if grid[0] > patches.shape[1] or grid[1] > patches.shape[2]:
        raise ConfigError(
            f"grid {grid} is finer than the encoder's {tuple(patches.shape[1:3])}; pool to a coarser one."
        )
    maps = patches.float()
    if tuple(patches.shape[1:3]) != grid:
        maps = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    return maps


def _sample_tokens(maps: Tensor, rows: Tensor, tokens_per_image: int, seed: int) -> Tensor:
    """Patch tokens `[B, T, D]` of maps `[B, h, w, D]`, at places drawn from (seed, row)."""
    size = maps.shape[1] * maps.shape[2]
    count = min(tokens_per_image, size)
    places = np.stack([_places(size, count, seed, row) for row in rows.tolist()])
    index = torch.from_numpy(places).to(maps.device)
    return maps.flatten(1, 2).gather(1, index[:, :, None].expand(-1, -1, maps.shape[3]))


def _places(size: int, count: int, seed: int, row: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, row]).permutation(size)[:count].astype(np.int64)


def _require_finite(kept: Mapping[str, Tensor], rows: Tensor, name: str) -> None:
    for value in kept.values():
        finite = value.flatten(1).isfinite().all(1).cpu()
        if not finite.all():
            bad = rows[~finite].tolist()
            raise DataError(
                f"{name} gives features that are not finite for {len(bad)} image(s), first row {bad[0]} of the data. "
                "A probe of NaN or infinity means nothing: check the weights, or use --precision float32."
            )


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
