"""clip_benchmark's WebDataset layout: classification sets with fixed train and test parts.

Layout (LAION-AI/CLIP_benchmark, `build_cb_webdatasets`): ROOT/classnames.txt, one class a line; for each part
ROOT/PART/nshards.txt and ROOT/PART/0.tar, 1.tar ... with an image and `.cls`, the number of its line, for each key.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.errors import DataError
from distill.probe.probe_set import TEST_PARTS, TRAIN_PART, ProbeSet, require_every_class

CLASS_NAMES = "classnames.txt"
NUM_SHARDS = "nshards.txt"


def is_layout(path: Path) -> bool:
    """Return whether a directory is laid out so."""
    return (path / CLASS_NAMES).is_file() or any((path / part / NUM_SHARDS).is_file() for part in TEST_PARTS)


def open_layout(path: Path, img_size_px: int) -> ProbeSet:
    """Open a set in this layout; the test part is the one that is reported.

    Without a train part the split is drawn from the test part.

    Raises:
        DataError: a file of the layout is missing or does not fit the others, or the set has no classes.
    """
    from distill.data.index import build_index
    from distill.probe.shard_images import ShardImages

    names = _class_names(path)
    test = next((part for part in TEST_PARTS if (path / part).is_dir()), None)
    if test is None:
        raise DataError(f"--data {path} has {CLASS_NAMES} but no folder test; clip_benchmark's layout needs it.")
    parts = [part for part in (TRAIN_PART, test) if (path / part).is_dir()]
    index = build_index({part: _shards(path / part) for part in parts}, key="--data")
    # The number in `.cls` is a line of classnames.txt, whatever numbers occur.
    table = np.array([*(_line(name, len(names), path) for name in index.label_names), -1], dtype=np.int64)
    labels = table[index.labels]
    if (labels < 0).any():
        row = int(np.flatnonzero(labels < 0)[0])
        raise DataError(f"{index.name_of(row)} has no .cls, so its class is not known. Write the set again.")
    require_every_class(labels, names, str(path))
    part_ids = index.domain_ids.astype(np.int64)
    return ProbeSet(
        str(path),
        index.fingerprint,
        ShardImages(index),
        img_size_px,
        labels,
        names,
        np.zeros(len(index), dtype=np.int64),
        (path.resolve().name,),
        tuple(index.groups),
        part_ids == index.domains.index(test) if len(parts) > 1 else None,
    )


def _class_names(path: Path) -> tuple[str, ...]:
    file = path / CLASS_NAMES
    if not file.is_file():
        raise DataError(
            f"--data {path} looks like clip_benchmark's layout but has no {CLASS_NAMES}, so it is no set for "
            "classification (sets for retrieval have none). Name another, or add the file: one class a line."
        )
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < 2:
        raise DataError(f"{file} names {len(names)} class(es); a probe needs two at least.")
    # Two classes of one name stay two classes: ImageNet has two that are called "crane".
    seen: dict[str, int] = {}
    unique: list[str] = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(unique)


def _shards(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.tar"), key=lambda file: (len(file.name), file.name))
    file = folder / NUM_SHARDS
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if not text.isdecimal():
        raise DataError(f"{file} is missing or holds no number; clip_benchmark's layout has it beside the shards.")
    if int(text) != len(found):
        raise DataError(f"{folder} holds {len(found)} shard(s), but {file} says {text}. Fetch the missing ones.")
    return [str(shard) for shard in found]


def _line(name: str, num_classes: int, path: Path) -> int:
    if not name.isdecimal() or int(name) >= num_classes:
        raise DataError(
            f"--data {path}: an image has the class {name!r}, but {CLASS_NAMES} has {num_classes} lines, numbered "
            "from 0. Write the set again, or mend the list."
        )
    return int(name)
