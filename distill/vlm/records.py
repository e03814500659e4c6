"""Records from files: LLaVA-style JSON or JSONL, caption lists, interleaved documents and plain text.

Files are checked whole when they are opened, so that a bad record is named before training and not within it. A JSONL
file stays on disk: only where its lines begin is kept, and any process can read any line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from rich.progress import track

from distill.errors import ConfigError, DataError
from distill.vlm.conversation import DOCUMENT_KINDS, IMAGE_PLACE, KINDS, Conversation, Kind, Role, Turn
from distill.vlm.image_sources import EncodedImage, FileImage, ImageSource, ShardImage, file_in
from distill.vlm.record_parsing import frame_lines, parse_record
from distill.vlm.record_shards import read_shards

__all__ = [
    "DOCUMENT_KINDS",
    "IMAGE_PLACE",
    "KINDS",
    "Conversation",
    "EncodedImage",
    "FileImage",
    "ImageSource",
    "Kind",
    "RecordFile",
    "Role",
    "ShardImage",
    "Turn",
    "frame_lines",
    "read_records",
    "read_shards",
]

MAX_RECORD_BYTES = 4 << 20
"""As for the JSON of a shard's sample."""

MAX_ARRAY_BYTES = 2 << 30
"""A JSON array is held in memory, at some three times its size; a larger one is to be written as JSONL."""

_TEXT_SUFFIX, _LINES, _ARRAY, _TABLE = ".txt", ".jsonl", ".json", ".tsv"
_BAR_FROM = 50_000


def read_records(
    path: Path, kind: Kind, image_folder: Path | None = None, *, caption_prompt: str = ""
) -> Sequence[Conversation]:
    """Return the records of a file, a folder of texts, or shards.

    Args:
        path: `.jsonl` (a record a line), `.json` (a list of records), `.tsv` (captions: image name, tab, caption),
            `.txt` or a folder of them (each one document), or a `.tar` or folder of tars.
        kind: what the records are. instruction: `conversations`, and `image` (a name or list) or `video` (a list of
            frames). caption: `image` and `caption`. interleaved: `text` and `images`, or parallel lists `texts` and
            `images`. text: `text`.
        image_folder: where the images' names start; the file's own folder by default.
        caption_prompt: what is asked of a captioned image; empty asks nothing.

    Raises:
        ConfigError: the kind is unknown, or the path has another ending.
        DataError: the file is missing or a record is not as it must be; file and record are named.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ConfigError(f"Unknown kind of records {kind!r}; choose one of {', '.join(KINDS)}.")
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return read_shards(str(path), kind, caption_prompt=caption_prompt)
    if path.is_dir() or path.suffix == _TEXT_SUFFIX:
        if kind != "text":
            raise ConfigError(f"{path} holds plain text, which has kind text; it was given as {kind}.")
        return TextFiles(path)
    return RecordFile(path, kind, image_folder, caption_prompt=caption_prompt)


class RecordFile(Sequence[Conversation]):
    """The records of one `.json`, `.jsonl` or `.tsv` file.

    Args:
        path: the file.
        kind: what its records are.
        image_folder: where the images' names start; the file's own folder by default.
        caption_prompt: what is asked of a captioned image.

    Raises:
        ConfigError: the file has another ending, or `.tsv` is given for anything but captions.
        DataError: it is missing, empty or too large, or a record is not as it must be.
    """

    def __init__(self, path: Path, kind: Kind, image_folder: Path | None = None, *, caption_prompt: str = "") -> None:
        self.path = Path(path)
        self.kind: Kind = kind
        self.caption_prompt = caption_prompt
        self.image_folder = self.path.parent if image_folder is None else Path(image_folder)
        if self.path.suffix not in (_LINES, _ARRAY, _TABLE) or (self.path.suffix == _TABLE and kind != "caption"):
            raise ConfigError(
                f"{path} has the ending {self.path.suffix!r}; records of kind {kind} are read from .jsonl or .json"
                f"{', captions from .tsv too' if kind == 'caption' else ''}."
            )
        if not self.path.is_file():
            raise DataError(f"The record file {path} does not exist (the current folder is {Path.cwd()}).")
        self._records: list[Any] = _read_array(self.path) if self.path.suffix == _ARRAY else []
        self._lines = _find_lines(self.path) if self.path.suffix != _ARRAY else np.empty((0, 2), dtype=np.int64)
        if not len(self):
            raise DataError(f"{path} holds no record; give a file with at least one.")
        self._check()

    def __len__(self) -> int:
        return len(self._records) or len(self._lines)

    @overload
    def __getitem__(self, number: int) -> Conversation: ...
    @overload
    def __getitem__(self, number: slice) -> list[Conversation]: ...
    def __getitem__(self, number: int | slice) -> Conversation | list[Conversation]:
        """Return one record, or several.

        Raises:
            IndexError: there is no such record.
            DataError: the file changed since it was opened.
        """
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}.")
        at = number % len(self)
        if self._records:
            return self._parse(at, self._records[at])
        with self.path.open("rb") as file:
            file.seek(int(self._lines[at, 0]))
            return self._parse_line(at, file.read(int(self._lines[at, 1])))

    def _check(self) -> None:
        bar = partial(track, description=f"checking {self.path.name}", disable=len(self) < _BAR_FROM, transient=True)
        if self._records:
            for number, record in enumerate(bar(self._records)):
                self._parse(number, record)
            return
        with self.path.open("rb") as file:
            for number in bar(range(len(self))):
                file.seek(int(self._lines[number, 0]))
                self._parse_line(number, file.read(int(self._lines[number, 1])))

    def _where(self, number: int) -> str:
        return f"{self.path}: record {number + 1}"

    def _parse_line(self, number: int, line: bytes) -> Conversation:
        where = self._where(number)
        try:
            if self.path.suffix == _TABLE:
                name, tab, caption = line.decode().strip("\r\n").partition("\t")
                if not tab:
                    raise DataError(f"{where} has no tab; a caption's line is the image's name, a tab, the caption.")
                return self._parse(number, {"image": name, "caption": caption})
            return self._parse(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no valid JSON ({error}); mend the line or leave it out.") from error

    def _parse(self, number: int, record: object) -> Conversation:
        where = self._where(number)
        resolve = partial(file_in, self.image_folder, where=where)
        return parse_record(self.kind, record, where, resolve, caption_prompt=self.caption_prompt)


def _read_array(path: Path) -> list[Any]:
    if (found := path.stat().st_size) > MAX_ARRAY_BYTES:
        raise DataError(f"{path} has {found:,} bytes; a JSON array may have {MAX_ARRAY_BYTES:,}. Write it as .jsonl.")
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); a .json file holds one list of records.") from error
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__}; a .json file holds one list of records.")
    return content


def _find_lines(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return start and length of every line that is not blank, int64 `[n, 2]`."""
    lines: list[tuple[int, int]] = []
    start = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise DataError(f"{path}: line {len(lines) + 1} is longer than {MAX_RECORD_BYTES:,} bytes; shorten it.")
            if line.strip():
                lines.append((start, len(line)))
            start += len(line)
    return np.array(lines, dtype=np.int64).reshape(-1, 2)


class TextFiles(Sequence[Conversation]):
    """Plain text: one file, or the `.txt` files of a folder by name; each is one document.

    Raises:
        DataError: there is no such file, or one is empty, too large or not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.paths = sorted(path.glob(f"*{_TEXT_SUFFIX}")) if path.is_dir() else [path]
        if not self.paths:
            raise DataError(
                f"The folder {path} has no *.txt and no *.tar file; name the folder that holds the records."
            )
        for _ in self._checked():
            pass

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, number: int) -> Conversation: ...
    @overload
    def __getitem__(self, number: slice) -> list[Conversation]: ...
    def __getitem__(self, number: int | slice) -> Conversation | list[Conversation]:
        """Return one document, or several."""
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        return self._read(self.paths[number])

    def _checked(self) -> Iterator[Conversation]:
        yield from map(self._read, self.paths)

    def _read(self, path: Path) -> Conversation:
        try:
            if (found := path.stat().st_size) > MAX_RECORD_BYTES:
                raise DataError(f"{path} has {found:,} bytes; a document may have {MAX_RECORD_BYTES:,}. Split it.")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
        return parse_record("text", {"text": text.strip()}, str(path), partial(file_in, path.parent, where=str(path)))
