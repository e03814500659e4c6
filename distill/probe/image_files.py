"""Image files to probe on: class folders, or a CSV file that names them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.data.decode import decode_image
from distill.data.image_header import ImageError
from distill.errors import DataError
from distill.probe.probe_set import TEST_PARTS, TRAIN_PART, ProbeSet, number, sort_names

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
COLUMNS = ("path", "label", "group", "domain", "split")
MAX_BYTES = 1 << 30
"""No image that can be decoded within the limit on pixels is larger; a file that is would only fill the memory."""


@dataclass(frozen=True)
class ImageEntry:
    """One image file; empty text means none."""

    file: Path
    label: str = ""
    group: str = ""
    domain: str = ""
    part: str = ""


class ImageFiles:
    """Image files by row, as `distill.probe.probe_set.Images`.

    Args:
        files: their paths.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def pixels(self, row: int) -> Tensor:
        """Return one image, `[3, H, W]` uint8.

        Raises:
            DataError: the file cannot be read or decoded.
        """
        try:
            return decode_image(read_bounded(self.files[row]))
        except ImageError as error:
            raise DataError(f"{self.files[row]}: {error}; mend the image or leave it out.") from error

    def name_of(self, row: int) -> str:
        """Return the file's path."""
        return str(self.files[row])


def read_bounded(file: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it cannot be read, or is larger than `MAX_BYTES`.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{file} has {size:,} bytes; an image file may have {MAX_BYTES:,}. Take it out.")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Mend the path or leave the image out.") from error


def is_image_folder(path: Path) -> bool:
    """Return whether a directory holds image files or folders, and no shards."""
    members = [member for member in path.iterdir() if not member.name.startswith(".")]
    if any(member.suffix == ".tar" for member in members):
        return False
    return any(member.is_dir() or member.suffix.lower() in EXTENSIONS for member in members)


def open_image_folder(path: Path, img_size_px: int) -> ProbeSet:
    """Open a directory whose folders are classes, or the parts train and test (or val) with such folders.

    A directory that holds images and no folder is a set without labels.

    Raises:
        DataError: a class folder is empty, images lie beside class folders, or the parts have other classes.
    """
    parts = _fixed_parts(path)
    if parts is None:
        return join_entries(str(path), path, _class_folders(path, ""), img_size_px)
    train, test = (_class_folders(path / name, name) for name in parts)
    only = sorted({entry.label for entry in train} ^ {entry.label for entry in test})
    if only:
        raise DataError(
            f"--data {path}: the parts {' and '.join(parts)} have different classes, for example {only[0]!r} is in one "
            "only. A class needs images in both: add them, or take its folder out."
        )
    return join_entries(str(path), path, train + test, img_size_px)


def _fixed_parts(path: Path) -> tuple[str, str] | None:
    test = next((name for name in TEST_PARTS if (path / name).is_dir()), None)
    return (TRAIN_PART, test) if test is not None and (path / TRAIN_PART).is_dir() else None


def _class_folders(path: Path, part: str) -> list[ImageEntry]:
    members = sorted(member for member in path.iterdir() if not member.name.startswith("."))
    loose = [member for member in members if member.is_file() and member.suffix.lower() in EXTENSIONS]
    folders = [member for member in members if member.is_dir()]
    if loose and folders:
        raise DataError(
            f"--data {path}: {loose[0].name} and {len(loose) - 1} more image(s) lie beside class folders and so "
            "have no label. Move each into the folder of its class."
        )
    if loose:
        return [ImageEntry(file, part=part) for file in loose]
    entries: list[ImageEntry] = []
    for folder in folders:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        if not files:
            raise DataError(
                f"--data {path}: the class folder {folder.name} holds no image ({', '.join(sorted(EXTENSIONS))}). "
                "Add images of the class, or take the folder out."
            )
        entries += [ImageEntry(file, folder.name, part=part) for file in files]
    return entries


def open_csv(path: Path, img_size_px: int) -> ProbeSet:
    """Open a CSV file with the columns path and label and, if wanted, group, domain and split (train or test).

    Paths are relative to the file's folder; an empty cell means none.

    Raises:
        DataError: the table is malformed, names a file twice or one that does not exist, or a group is in both parts.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            fields = list(reader.fieldnames or ())
            missing = [column for column in ("path", "label") if column not in fields]
            if missing:
                raise DataError(
                    f"--data {path} lacks the column(s) {', '.join(missing)}; it has {', '.join(fields) or 'none'}. "
                    f"The first line names the columns: {', '.join(COLUMNS)}, of which path and label are needed; "
                    "leave a label's cell empty where there is none."
                )
            entries = [_entry(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--data {path} cannot be read as CSV in UTF-8: {error}. Mend the file.") from error
    counts = Counter(entry.file for entry in entries)
    twice = next((file for file, count in counts.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"--data {path} names {twice} twice. An image may stand there once.")
    return join_entries(str(path), path.parent, entries, img_size_px)


def _entry(table: Path, line: int, row: dict[str, str]) -> ImageEntry:
    cells = {column: (row.get(column) or "").strip() for column in COLUMNS}
    file = table.parent / cells["path"]
    if not cells["path"] or not file.is_file():
        raise DataError(f"--data {table}, line {line}: there is no file {cells['path']!r} in {table.parent}.")
    split = cells["split"]
    if split and split not in (TRAIN_PART, *TEST_PARTS):
        raise DataError(f"--data {table}, line {line}: split is {split!r}; it is train, test, or empty in every line.")
    return ImageEntry(file, cells["label"], cells["group"], cells["domain"], split)


def join_entries(source: str, root: Path, entries: Sequence[ImageEntry], img_size_px: int) -> ProbeSet:
    """Return the probe set of image files.

    Args:
        source: for messages.
        root: folder that paths are taken relative to in the fingerprint, so that a set may move.
        entries: the files; either all or none have a part.
        img_size_px: side of the square views.

    Raises:
        DataError: some images have a part and others none, a group is in both parts, or a file cannot be read.
    """
    parts = {entry.part for entry in entries}
    if "" in parts and len(parts) > 1:
        raise DataError(f"--data {source}: some images have a split and others none. Fill the column, or drop it.")
    in_train = {entry.group for entry in entries if entry.part == TRAIN_PART and entry.group}
    both = sorted(in_train & {entry.group for entry in entries if entry.part != TRAIN_PART})
    if both and "" not in parts:
        raise DataError(
            f"--data {source}: the group {both[0]!r} is in the train and in the test part, so the test would measure "
            "memory. Keep each group in one part."
        )
    names = sort_names(entry.label for entry in entries if entry.label)
    domain_of = [entry.domain or root.resolve().name for entry in entries]
    domains = sort_names(domain_of)
    return ProbeSet(
        source,
        _fingerprint(root, entries),
        ImageFiles([entry.file for entry in entries]),
        img_size_px,
        number([entry.label for entry in entries], names),
        names,
        number(domain_of, domains),
        domains,
        tuple(entry.group for entry in entries),
        None if "" in parts or not parts else np.array([entry.part != TRAIN_PART for entry in entries]),
    )


def _fingerprint(root: Path, entries: Sequence[ImageEntry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        name = entry.file.relative_to(root).as_posix() if entry.file.is_relative_to(root) else str(entry.file)
        content = hashlib.sha256(read_bounded(entry.file)).hexdigest()
        row = (name, content, entry.label, entry.group, entry.domain, entry.part)
        digest.update(json.dumps(row, separators=(",", ":")).encode())
    return digest.hexdigest()
