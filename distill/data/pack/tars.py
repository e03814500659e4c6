"""WebDataset tars, as img2dataset writes them: `<number>.tar`, and beside it `<number>.parquet` on every download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.data.pack.roots import require_inside
from distill.data.pack.rows import FileRange, SourceRow, as_text
from distill.data.pack.tables import read_columns, read_schema
from distill.data.shard_index import MAX_JSON_BYTES
from distill.data.tar_members import IMAGE_EXTENSIONS, Member, read_members
from distill.errors import ConfigError, DataError

COLUMNS = ("label", "group", "domain")
_METADATA = ("key", "status", "error_message", "url")


class WebDatasetTars:
    """All samples of the tars in a folder, and the downloads that img2dataset says have failed.

    Args:
        root: the folder, or one tar.
        columns: our name -> the name in a sample's JSON, for `COLUMNS`.

    Raises:
        ConfigError: --columns names something else.
        DataError: a tar leads out of the folder.
    """

    def __init__(self, root: Path, columns: Mapping[str, str] | None) -> None:
        self.root = root.resolve().parent if root.is_file() else root.resolve()
        names = [root.name] if root.is_file() else sorted(path.name for path in self.root.glob("*.tar"))
        self.files = [Path(name) for name in names]
        for file in self.files:
            require_inside(self.root, file)
        unknown = sorted(set(columns or {}) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"--columns.{unknown[0]} is unknown for tars; known are {', '.join(COLUMNS)}.")
        # Their JSON is read only when they are listed.
        self.may_name_domains = True
        self.columns = {name: name for name in COLUMNS} | dict(columns or {})

    def rows(self) -> Iterator[SourceRow]:
        """Yield a row for each sample of each tar, and one for each download that failed.

        Raises:
            DataError: a tar is damaged, or holds something that is not allowed.
        """
        for file in self.files:
            keys: set[str] = set()
            try:
                with (self.root / file).open("rb") as archive:
                    for row in self._of_tar(archive, file):
                        keys.add(row.key)
                        yield row
            except OSError as error:
                raise DataError(f"The tar {self.root / file} cannot be read: {error.strerror or error}.") from error
            yield from self._missing(file, keys)

    def _of_tar(self, archive: BinaryIO, file: Path) -> Iterator[SourceRow]:
        status = (self.root / file).stat()
        samples: dict[str, list[Member]] = {}
        for member in read_members(archive, str(self.root / file)):
            samples.setdefault(member.key, []).append(member)
        for key, members in samples.items():
            source, stamp = f"{file}: {key}", (status.st_size, status.st_mtime_ns)
            images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
            problem = f"the sample has {len(images)} images; it needs exactly one" if len(images) != 1 else None
            facts, json_problem = _read_facts(archive, members)
            problem = problem or json_problem
            if problem is not None:
                yield SourceRow(source, key, None, size=stamp[0], mtime_ns=stamp[1], problem=problem)
                continue
            place = FileRange(str(file), images[0].offset, images[0].size)
            values = [as_text(facts.get(self.columns[name])) for name in COLUMNS]
            yield SourceRow(source, key, place, *values, size=stamp[0], mtime_ns=stamp[1])

    def _missing(self, file: Path, keys: set[str]) -> Iterator[SourceRow]:
        table = (self.root / file).with_suffix(".parquet")
        if not table.is_file():
            return
        require_inside(self.root, file.with_suffix(".parquet"))
        present = [name for name in _METADATA if name in read_schema(table).names]
        if "key" not in present or "status" not in present:
            return
        for values in read_columns(table, present):
            key = str(values["key"])
            if key in keys:
                continue
            reason = values.get("error_message") or "it is listed as downloaded, and the tar does not hold it"
            source = as_text(values.get("url")) or f"{table.name}: {key}"
            yield SourceRow(source, key, None, problem=f"img2dataset, {values['status']}: {reason}")


def _read_facts(archive: BinaryIO, members: list[Member]) -> tuple[dict[str, Any], str | None]:
    """Return what a sample's JSON says, and why it cannot be used."""
    found = [member for member in members if member.extension == "json"]
    if not found:
        return {}, None
    if found[0].size > MAX_JSON_BYTES:
        return {}, f"its JSON has {found[0].size:,} bytes; {MAX_JSON_BYTES:,} are allowed"
    archive.seek(found[0].offset)
    try:
        content: Any = json.loads(archive.read(found[0].size))
    except (ValueError, RecursionError) as error:
        return {}, f"its JSON is not valid ({error})"
    if not isinstance(content, dict):
        return {}, "its JSON is no object"
    return cast("dict[str, Any]", content), None
