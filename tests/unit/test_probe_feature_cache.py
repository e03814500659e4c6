"""Cached features are those of the same encoder, view and data, or they are computed anew, or refused by name."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from distill.errors import DataError
from distill.probe.cached_features import extract_cached
from distill.probe.extraction import Extraction
from distill.probe.feature_cache import FeatureCache, encoder_key
from distill.probe.feature_records import Features, Wanted

HOW = Extraction(batch_size=4, img_size_px=32)
WANTED = Wanted(layers=(-2, -1), token_grids=((2, 2),), tokens_per_image=2, dense_grid=(2, 2))


class Images:
    """Six random images that count how often they are read."""

    def __init__(self) -> None:
        self.images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.reads += 1
        return {"image": self.images[row], "label": row % 2, "domain": 0, "row": row}


def take(
    encoder: nn.Module,
    images: Images,
    cache: FeatureCache,
    how: Extraction = HOW,
    wanted: Wanted = WANTED,
    data: str = "d",
) -> Features:
    return extract_cached(
        encoder, images, how, wanted, cache=cache, data=(data, list(range(6))), name="small", console=None
    )


def test_features_come_back_from_the_cache_without_reading_an_image(
    make_encoder: Callable[..., nn.Module], tmp_path: Path
) -> None:
    images, cache, encoder = Images(), FeatureCache(tmp_path / "cache"), make_encoder()
    first, again = take(encoder, images, cache), take(encoder, images, cache)
    assert images.reads == 6
    for layer in (-2, -1):
        assert torch.equal(first.by_layer[layer], again.by_layer[layer])
        assert torch.equal(first.tokens_by_layer[layer][2, 2], again.tokens_by_layer[layer][2, 2])
    assert first.dense is not None
    assert again.dense is not None
    assert torch.equal(first.dense, again.dense)
    assert (again.labels.tolist(), again.rows.tolist(), again.num_bad) == ([0, 1] * 3, list(range(6)), 0)
    assert [file.suffix for file in cache.folder.iterdir()] == [".safetensors"]


def test_anything_that_features_depend_on_gives_another_key(
    make_encoder: Callable[..., nn.Module], tmp_path: Path
) -> None:
    images, cache, encoder = Images(), FeatureCache(tmp_path), make_encoder()
    take(encoder, images, cache)
    take(encoder, images, cache, data="other")
    take(encoder, images, cache, how=replace(HOW, pool="prefix"))
    take(encoder, images, cache, how=replace(HOW, precision="bfloat16"))
    take(encoder, images, cache, how=replace(HOW, seed=1))
    take(encoder, images, cache, how=replace(HOW, img_size_px=31))
    take(encoder, images, cache, wanted=replace(WANTED, layers=(-1,)))
    take(encoder, images, cache, wanted=replace(WANTED, dense_grid=None))
    assert len(list(tmp_path.iterdir())) == 8
    assert images.reads == 8 * 6


def test_one_value_of_one_weight_makes_another_encoder(make_encoder: Callable[..., nn.Module], tmp_path: Path) -> None:
    images, cache, encoder = Images(), FeatureCache(tmp_path), make_encoder()
    before, key = take(encoder, images, cache).by_layer[-2], encoder_key(encoder)
    with torch.no_grad():
        parameter = dict(encoder.named_parameters())["patch.weight"]
        # Less than bfloat16 resolves: a step of training late in a run.
        parameter.view(-1)[0] *= 1 + 1e-5
    assert encoder_key(encoder)["weights"] == key["weights"]
    assert encoder_key(encoder) != key
    assert not torch.equal(take(encoder, images, cache).by_layer[-2], before)


def test_a_file_of_another_encoder_under_this_ones_name_is_refused(
    make_encoder: Callable[..., nn.Module], tmp_path: Path
) -> None:
    images, cache = Images(), FeatureCache(tmp_path)
    one, other = make_encoder(), make_encoder(patch_size=16)
    take(one, images, cache)
    (of_one,) = tmp_path.iterdir()
    take(other, images, cache)
    (of_other,) = set(tmp_path.iterdir()) - {of_one}
    shutil.copy(of_one, of_other)
    with pytest.raises(DataError, match="are not of this encoder and data: .*weights"):
        take(other, images, cache)


def test_a_damaged_file_is_refused_by_name(make_encoder: Callable[..., nn.Module], tmp_path: Path) -> None:
    images, cache, encoder = Images(), FeatureCache(tmp_path), make_encoder()
    take(encoder, images, cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=f"{file.name} are damaged"):
        take(encoder, images, cache)


def test_a_hit_is_announced(make_encoder: Callable[..., nn.Module], tmp_path: Path) -> None:
    images, cache, encoder = Images(), FeatureCache(tmp_path), make_encoder()
    take(encoder, images, cache)
    console = Console(record=True, file=io.StringIO())
    extract_cached(encoder, images, HOW, WANTED, cache=cache, data=("d", list(range(6))), name="small", console=console)
    assert "features of small from" in console.export_text()
