"""Leaks: probed images that are in the training shards too, counted, and left out where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from distill.checkpoint import RunDir
from distill.errors import DataError, DistillError
from distill.probe.duplicates import ImageHashes, find_duplicates, hash_images
from distill.probe.encoders import run_of
from distill.probe.feature_cache import FeatureCache, rows_key
from distill.probe.probe_set import ProbeSet, open_probe_set

LeakAction = Literal["report", "exclude", "off"]

MAX_LISTED_ROWS = 1000


@dataclass(frozen=True)
class LeakCheck:
    """What was found.

    Attributes:
        train: what the images were compared with.
        checked: images that were compared.
        exact: rows of the probed images that are there with equal pixels.
        near: rows of those that are there nearly.
        excluded: whether they are left out of the probe.
    """

    train: str
    checked: int
    exact: list[int]
    near: list[int]
    excluded: bool

    @property
    def block(self) -> dict[str, Any]:
        """The key "leaks" of probe.json; at most `MAX_LISTED_ROWS` rows are listed."""
        rows = sorted([*self.exact, *self.near])
        return {
            "train": self.train,
            "exact": len(self.exact),
            "near": len(self.near),
            "rows": rows[:MAX_LISTED_ROWS],
            "checked": self.checked,
            "excluded": len(rows) if self.excluded else 0,
        }


def training_data(encoder: str) -> list[str]:
    """Return the shards that a run, or an export's run, was trained on; none where that is not known."""
    run = run_of(Path(encoder))
    if run is None:
        return []
    data: Any = RunDir(run).config.get("data")
    train: Any = cast(dict[str, Any], data).get("train") if isinstance(data, dict) else None
    if isinstance(train, dict):
        patterns = cast(dict[str, Any], train).values()
        nested = [entry if isinstance(entry, list) else [entry] for entry in patterns]
        return [str(pattern) for entry in nested for pattern in cast(list[Any], entry)]
    return [str(train)] if train else []


@dataclass(frozen=True)
class LeakSearch:
    """What to look for leaks in.

    Attributes:
        train: shards, or whatever else `open_probe_set` opens, that were trained on.
        action: "off" looks for nothing.
        must_exist: whether it is an error when these are not there: they were named on the command line.
        num_workers: processes that decode.
        cache: where hashes are kept.
    """

    train: list[str]
    action: LeakAction = "report"
    must_exist: bool = True
    num_workers: int = 0
    cache: FeatureCache | None = None


def check_leaks(data: ProbeSet, rows: list[int], look: LeakSearch, console: Console) -> LeakCheck | None:
    """Look for the probed images among those that were trained on, and say what was found.

    Args:
        data: the probed images.
        rows: which of them.
        look: where to look.
        console: where it is said.

    Returns:
        What was found; None where nothing was compared.

    Raises:
        DistillError: the shards cannot be read though they must exist, or every image would be left out.
    """
    if look.action == "off" or not look.train:
        return None
    try:
        trained = [open_probe_set(pattern, data.img_size_px) for pattern in look.train]
    except DistillError as error:
        if look.must_exist:
            raise
        console.print(f"Leaks were not looked for, the training shards cannot be read: {error}", markup=False)
        return None
    ours, at = _hashes(data, rows, "hashes of probed images", look, console)
    found = np.zeros((2, len(ours)), dtype=np.bool_)
    for part in trained:
        everything = list(range(len(part)))
        theirs, _ = _hashes(part, everything, "hashes of training images", look, console)
        duplicates = find_duplicates(ours, theirs)
        found |= np.stack([duplicates.exact, duplicates.near])
    exact, near = at[found[0]].tolist(), at[found[1] & ~found[0]].tolist()
    check = LeakCheck(", ".join(look.train), len(ours), exact, near, look.action == "exclude" and bool(exact or near))
    _say(check, data, console)
    return check


def _say(check: LeakCheck, data: ProbeSet, console: Console) -> None:
    leaked = [*check.exact, *check.near]
    if not leaked:
        console.print(f"No leak: none of {check.checked} probed images is in {check.train}.", markup=False)
        return
    console.print(
        f"LEAK: of {check.checked} probed images {len(check.exact)} are in the training shards exactly and "
        f"{len(check.near)} nearly, the first being {data.images.name_of(min(leaked))}. "
        + (
            "They are left out."
            if check.excluded
            else "Figures on them measure memory; --leaks exclude leaves them out."
        ),
        markup=False,
    )
    if check.excluded and len(leaked) == check.checked:
        raise DataError(f"All {check.checked} probed images are in {check.train}; probe on images that were held out.")


def without_leaks(rows: list[int], check: LeakCheck | None) -> list[int]:
    """Return the rows that are left when leaks are left out, where that was asked for."""
    left_out = set(check.exact) | set(check.near) if check is not None and check.excluded else set[int]()
    return [row for row in rows if row not in left_out]


def _hashes(
    data: ProbeSet, rows: list[int], what: str, look: LeakSearch, console: Console
) -> tuple[ImageHashes, NDArray[np.int64]]:
    key = {"what": "image hashes", "data": data.fingerprint, "rows": rows_key(rows)}
    kept = None if look.cache is None else look.cache.read(key)
    if kept is not None:
        near = kept["near"].numpy().view(np.uint64)
        return ImageHashes(kept["exact"].numpy(), near, kept["thumbnails"].numpy()), kept["row"].numpy()
    hashes, at = hash_images(data.images, rows, what=what, num_workers=look.num_workers, console=console)
    if look.cache is not None and len(hashes):
        tensors = {
            "exact": torch.from_numpy(hashes.exact.copy()),
            "near": torch.from_numpy(hashes.near.view(np.int64).copy()),
            "thumbnails": torch.from_numpy(hashes.thumbnails.copy()),
            "row": torch.from_numpy(at),
        }
        look.cache.write(key, tensors)
    return hashes, at
