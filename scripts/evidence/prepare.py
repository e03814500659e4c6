"""Split the images of the evidence study, and write training shards and probe tables of them.

    python scripts/evidence/prepare.py ../shared/assets runs/evidence/data

Reads `manifest.jsonl` of the assets (see docs/results.md). Of every labelled data set 40 % of the groups are held out:
nothing is trained on them. Pages of one receipt with their crops, and pictures of one examination question, are a
group. A held-out image that looks like a training image is left out of both. Labels play no part in training.

Writes into the folder:
    train.csv, val.csv            what `distill pack` makes of them: train/, val/
    train-files/<domain>/         links to the training images, for tools that read folders
    probe/<data set>.csv          path, label, group, domain, split: the test part is the held-out one
    probe/lines.jsonl             held-out receipt crops with their text lines, for the OCR probe
    splits.json                   counts
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from distill.data.pack import pack
from distill.probe.duplicates import find_duplicates, hash_images
from distill.probe.image_files import ImageFiles
from distill.probe.protocol import split_by_group

PROBED = ("trashnet", "dtd10", "chart25", "gaokao_mm", "sroie_page")
PAGES, CROPS = "sroie_page", "sroie_crops"
HELD_OUT = 0.4
VAL_IMAGES_PER_DOMAIN = 16


@dataclass(frozen=True)
class Entry:
    """One image: `path` is relative to the assets, `group` names what stays on one side."""

    path: str
    dataset: str
    domain: str
    label: str
    group: str
    lines: Any


def group_of(path: str, dataset: str) -> str:
    """Return what an image belongs to: a receipt with its crops, an examination question, else itself."""
    stem = Path(path).stem
    if dataset in (PAGES, CROPS):
        return f"receipt-{stem.partition('_')[0]}"
    return f"{dataset}-{stem.rpartition('_')[0]}" if dataset == "gaokao_mm" else f"{dataset}-{path}"


def read_manifest(file: Path) -> list[Entry]:
    """Return the images that the assets' manifest lists."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [
        Entry(
            row["path"],
            row["dataset"],
            row["domain"],
            row["label"] or "",
            group_of(row["path"], row["dataset"]),
            row.get("lines"),
        )
        for row in rows
    ]


def held_out_groups(entries: Sequence[Entry], seed: int) -> set[str]:
    """Return the groups that are held out: of each probed data set 40 %, every class alike."""
    held: set[str] = set()
    for dataset in PROBED:
        mine = [entry for entry in entries if entry.dataset == dataset]
        if not mine:
            continue
        names = sorted({entry.label for entry in mine})
        strata = np.asarray([names.index(entry.label) for entry in mine], dtype=np.int64)
        # Two of the three parts together are for training: each class then has groups on both sides.
        shares = ((1 - HELD_OUT) * 0.6, (1 - HELD_OUT) * 0.4, HELD_OUT)
        split = split_by_group([entry.group for entry in mine], strata, seed=seed, fractions=shares)
        held |= {mine[at].group for at in split.test.tolist()}
    return held


def without_copies(root: Path, held: list[Entry], trained: list[Entry], console: Console) -> list[Entry]:
    """Return the held-out images that no training image looks like."""
    hashes = []
    for what, entries in (("Hashing held-out images", held), ("Hashing training images", trained)):
        images = ImageFiles([root / entry.path for entry in entries])
        hashes.append(hash_images(images, range(len(entries)), what=what, console=console)[0])
    copies: NDArray[np.bool_] = find_duplicates(hashes[0], hashes[1]).either
    return [entry for entry, is_copy in zip(held, copies.tolist(), strict=True) if not is_copy]


def write_table(file: Path, root: Path, parts: dict[str, Sequence[Entry]]) -> None:
    """Write a CSV file of images with the part they are in; an empty name leaves the column out."""
    columns = ["path", "label", "group", "domain", *(["split"] if "" not in parts else [])]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for part, entries in parts.items():
            for entry in entries:
                row = [str(root / entry.path), entry.label, entry.group, entry.domain, part]
                writer.writerow(row[: len(columns)])


def link_files(folder: Path, root: Path, entries: Sequence[Entry]) -> None:
    """Make a link to each image under `<domain>/`, numbered, for tools that read folders; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, entry in enumerate(entries):
        link = folder / entry.domain / f"{number:05d}{Path(entry.path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / entry.path)


def validation_images(held: Sequence[Entry], seed: int) -> list[Entry]:
    """Return a few held-out images of each domain, for the cosine that training reports."""
    order = np.random.default_rng(seed).permutation(len(held)).tolist()
    count: Counter[str] = Counter()
    chosen: list[Entry] = []
    for at in order:
        count[held[at].domain] += 1
        if count[held[at].domain] <= VAL_IMAGES_PER_DOMAIN:
            chosen.append(held[at])
    return chosen


def write_lines(file: Path, root: Path, entries: Sequence[Entry]) -> None:
    """Write the text lines of receipt crops as a manifest that the OCR probe reads."""
    rows = [
        {"path": str(root / entry.path), "group": entry.group, "dataset": entry.dataset, "lines": entry.lines}
        for entry in entries
        if entry.lines
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(assets: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Split, write tables and shards; return the counts, as `splits.json` holds them."""
    console, root = Console(), assets.resolve()
    entries = read_manifest(root / "manifest.jsonl")
    held_groups = held_out_groups(entries, seed)
    trained = [entry for entry in entries if entry.group not in held_groups]
    candidates = [entry for entry in entries if entry.group in held_groups]
    held = without_copies(root, candidates, trained, console)
    write_table(out / "train.csv", root, {"": trained})
    write_table(out / "val.csv", root, {"": validation_images(held, seed)})
    for dataset in PROBED:
        parts = {"train": trained, "test": held}
        mine = {part: [e for e in found if e.dataset == dataset] for part, found in parts.items()}
        if mine["test"]:
            write_table(out / "probe" / f"{dataset}.csv", root, mine)
    write_lines(out / "probe" / "lines.jsonl", root, [entry for entry in held if entry.dataset == CROPS])
    link_files(out / "train-files", root, trained)
    for part in ("train", "val"):
        pack(str(out / f"{part}.csv"), out / part, root=root, num_workers=1)
    counts = {
        "images": len(entries),
        "held_out_images_like_a_training_image": len(candidates) - len(held),
        "trained": dict(Counter(entry.dataset for entry in trained)),
        "held_out": dict(Counter(entry.dataset for entry in held)),
    }
    (out / "splits.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    console.print_json(data=counts)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments.assets, arguments.out)
