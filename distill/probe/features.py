"""Frozen features of a data set: pooled vectors for classifiers, and a few patch tokens an image for fidelity.

Legend: N images, T sampled tokens an image, D the width of the encoder's last hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from distill.encoder import Encoder, Layer
from distill.errors import ConfigError, DataError
from distill.precision import choose_precision

Pool = Literal["mean", "prefix", "mean_prefix"]
Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]
Grid = tuple[int, int]

MAX_BAD_FRACTION = 0.01
"""More undecodable images than this stop the probe: the score would be of another data set."""

CPU_BATCH = 4
"""Largest batch on a CPU: EfficientNet-Lite0 at 448 px takes 1.8 times the CPU time an image in batches of 32, whose
activations outgrow the caches and are mapped anew by the system for every layer."""


class Samples(Protocol):
    """A map-style data set of `{"image": uint8 [3, S, S], "label": int, "domain": int, "row": int}`."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one sample; raises DataError when its image cannot be used."""
        ...


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a data set, on the CPU, in the data set's order.

    Attributes:
        pooled: `[N, D]`, float32; twice as wide for pool "mean_prefix".
        labels: `[N]`, int64; -1 for no label.
        domains: `[N]`, int64.
        rows: `[N]`, int64, row of each image in the index.
        tokens: for each requested grid, `[N, T, D]` float32 patch tokens at places that depend only on seed and row.
        num_bad: images left out because they could not be decoded.
    """

    pooled: Tensor
    labels: Tensor
    domains: Tensor
    rows: Tensor
    tokens: dict[Grid, Tensor] = field(default_factory=dict[Grid, Tensor])
    num_bad: int = 0


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


def choose_device(device: str) -> str:
    """Return the device to run encoders on; "auto" takes a GPU when there is one.

    Raises:
        ConfigError: "cuda" was asked for, and torch sees no CUDA device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    return device


def choose_dtype(precision: PrecisionChoice, device: str) -> Precision:
    """Return the precision to run encoders in; "auto" takes bfloat16 where the device computes it fast."""
    if precision != "auto":
        return precision
    return "bfloat16" if choose_precision("cuda" if device == "cuda" else "cpu") == "bf16-mixed" else "float32"


@torch.no_grad()
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
) -> Features:
    """Run an encoder once over a data set and keep pooled features of its last hidden state.

    Args:
        encoder: offers `distill.encoder.Encoder`, weights loaded; set to eval mode and moved to `device`.
        dataset: the images, uint8; each encoder normalises for itself.
        batch_size: images a forward pass; at most `CPU_BATCH` are used on a CPU.
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

    Raises:
        ConfigError: `pool` needs a prefix token and the encoder has none, or a grid is finer than the encoder's.
        DataError: a feature is not finite, no image can be decoded, or more than 1 % cannot.
    """
    contract = cast(Encoder, encoder.to(device).eval())
    if pool != "mean" and contract.num_prefix_tokens == 0:
        raise ConfigError(f"--pool {pool} needs a class token and {name} has none; use --pool mean.")
    store = _Store(len(dataset))
    if torch.device(device).type == "cpu":
        batch_size = min(batch_size, CPU_BATCH)
    loader = DataLoader(_Tolerant(dataset), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with _progress(console) as progress:
        task = progress.add_task(f"features of {name}", total=len(dataset))
        for batch, errors in loader:
            store.note_bad(errors)
            if batch is not None:
                with autocast:
                    layer = contract.forward_hidden_states(batch["image"].to(device), 1)[-1]
                kept: dict[str | Grid, Tensor] = {"pooled": _pool(layer, pool)}
                for grid in token_grids:
                    kept[grid] = _sample_tokens(layer[1], grid, batch["row"], tokens_per_image, seed)
                _require_finite(kept, batch["row"], name)
                store.append({**kept, **{key: batch[key] for key in ("label", "domain", "row")}})
            progress.advance(task, len(errors) + (0 if batch is None else len(batch["row"])))
    return store.features(token_grids, name)


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

    def __init__(self, size: int) -> None:
        self._size = size
        self._filled = 0
        self._tensors: dict[str | Grid, Tensor] = {}
        self._num_bad = 0
        self._first_error = ""

    def note_bad(self, errors: list[str]) -> None:
        self._num_bad += len(errors)
        self._first_error = self._first_error or "".join(errors[:1])
        if self._num_bad > max(1, int(MAX_BAD_FRACTION * self._size)):
            raise DataError(
                f"{self._num_bad} of {self._size} images cannot be decoded; at most {MAX_BAD_FRACTION:.0%} (and one) "
                f"may be left out. The first: {self._first_error} Repair the shards and index them again."
            )

    def append(self, batch: Mapping[str | Grid, Tensor]) -> None:
        stop = self._filled
        for key, value in batch.items():
            if key not in self._tensors:
                self._tensors[key] = torch.empty(self._size, *value.shape[1:], dtype=value.dtype)
            stop = self._filled + len(value)
            self._tensors[key][self._filled : stop] = value.cpu()
        self._filled = stop

    def features(self, grids: Sequence[Grid], name: str) -> Features:
        if not self._filled:
            raise DataError(f"No image could be decoded for {name}. {self._first_error or 'The data set is empty.'}")
        kept = {key: value[: self._filled] for key, value in self._tensors.items()}
        tokens = {grid: kept[grid] for grid in grids}
        return Features(kept["pooled"], kept["label"], kept["domain"], kept["row"], tokens, self._num_bad)


def _pool(layer: Layer, pool: Pool) -> Tensor:
    prefix, patches = layer
    mean = patches.flatten(1, 2).float().mean(1)
    if pool == "mean":
        return mean
    first = prefix[:, 0].float()
    return first if pool == "prefix" else torch.cat([mean, first], dim=1)


def _sample_tokens(patches: Tensor, grid: Grid, rows: Tensor, tokens_per_image: int, seed: int) -> Tensor:
    """Patch tokens `[B, T, D]`, float32, of the map pooled to `grid`, at places drawn from (seed, row)."""
    height, width = grid
    if height > patches.shape[1] or width > patches.shape[2]:
        raise ConfigError(
            f"grid {grid} is finer than the encoder's {tuple(patches.shape[1:3])}; pool to a coarser one."
        )
    maps = patches.float()
    if tuple(patches.shape[1:3]) != grid:
        maps = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    count = min(tokens_per_image, height * width)
    places = np.stack([_places(height * width, count, seed, row) for row in rows.tolist()])
    index = torch.from_numpy(places).to(maps.device)
    return maps.flatten(1, 2).gather(1, index[:, :, None].expand(-1, -1, maps.shape[3]))


def _places(size: int, count: int, seed: int, row: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, row]).permutation(size)[:count].astype(np.int64)


def _require_finite(kept: Mapping[str | Grid, Tensor], rows: Tensor, name: str) -> None:
    for value in kept.values():
        finite = value.flatten(1).isfinite().all(1).cpu()
        if not finite.all():
            bad = rows[~finite].tolist()
            raise DataError(
                f"{name} gives features that are not finite for {len(bad)} image(s), first row {bad[0]} of the index. "
                "A probe of NaN or infinity means nothing: check the weights, or use --precision float32."
            )


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
