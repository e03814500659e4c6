"""A CSV or Parquet list: a row an image, which is a path or, in Parquet, the bytes themselves."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from distill.data.pack.columns import choose_columns
from distill.data.pack.roots import UnusableError, check_file, is_utf8, printable
from distill.data.pack.rows import SourceRow, TableCell, WholeFile, as_text
from distill.data.pack.tables import has_bytes_field, is_bytes, read_columns, read_schema
from distill.errors import ConfigError, DataError

COLUMNS = ("path", "bytes", "key", "label", "group", "domain")


class TableList:
    """The rows of one CSV or Parquet file.

    Args:
        file: the list; CSV is UTF-8 with a line of column names.
        root: folder that the paths start from, and that no path may lead out of.
        columns: our name -> the file's name, for files whose columns are called otherwise; the file's other columns
            are then left aside. Without it, every column must be one of `COLUMNS`.

    Raises:
        ConfigError: the columns do not say where the images are, or one is unknown.
        DataError: the file cannot be read.
    """

    def __init__(self, file: Path, root: Path, columns: Mapping[str, str] | None) -> None:
        self.file, self.root = file, root.resolve()
        self._is_csv = file.suffix.lower() == ".csv"
        self.columns = choose_columns(self._header(), COLUMNS, columns, file)
        if ("path" in self.columns) == ("bytes" in self.columns):
            raise ConfigError(
                f"{file} has the columns {', '.join(self.columns)}; it needs exactly one of path and bytes. Name it by "
                "--columns, for example --columns.path=FILE_COLUMN."
            )
        self.may_name_domains = "domain" in self.columns
        if "bytes" in self.columns:
            self._check_bytes()

    def rows(self) -> Iterator[SourceRow]:
        """Yield a row for each line or row of the list."""
        read = self._csv_rows() if self._is_csv else self._parquet_rows()
        for number, values in enumerate(read):
            yield self._cell_row(number, values) if "bytes" in self.columns else self._path_row(number, values)

    def _header(self) -> Sequence[str]:
        if not self._is_csv:
            return read_schema(self.file).names
        for line in self._csv_lines():
            return line
        raise DataError(f"{self.file} is empty; its first line must name the columns, such as path,label.")

    def _check_bytes(self) -> None:
        name = self.columns["bytes"]
        schema = None if self._is_csv else read_schema(self.file)
        if schema is None or not (is_bytes(schema, name) or has_bytes_field(schema, name)):
            raise ConfigError(
                f"{self.file}: the column {name!r} holds no bytes; give the images as paths, or in Parquet as binary."
            )

    def _csv_lines(self) -> Iterator[list[str]]:
        try:
            with self.file.open(newline="", encoding="utf-8-sig") as file:
                yield from csv.reader(file, strict=True)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"The list {self.file} cannot be read as CSV in UTF-8 ({error}); save it again.") from error

    def _csv_rows(self) -> Iterator[dict[str, Any]]:
        lines = self._csv_lines()
        header = next(lines)
        for line in lines:
            if not line:
                continue
            if len(line) != len(header):
                yield {"problem": f"the line has {len(line)} fields; the first line names {len(header)}"}
                continue
            values = dict(zip(header, line, strict=True))
            yield {ours: values[theirs] for ours, theirs in self.columns.items()}

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        texts = {ours: theirs for ours, theirs in self.columns.items() if ours != "bytes"}
        for values in read_columns(self.file, list(texts.values())):
            yield {ours: values[theirs] for ours, theirs in texts.items()}

    def _path_row(self, number: int, values: dict[str, Any]) -> SourceRow:
        relative = as_text(values.get("path"))
        if relative is None:
            problem = values.get("problem") or "it has no path"
            return SourceRow(f"{self.file.name}: row {number}", str(number), None, problem=problem)
        key = as_text(values.get("key")) or str(PurePosixPath(relative).with_suffix(""))
        facts = (as_text(values.get("label")), as_text(values.get("group")), as_text(values.get("domain")))
        try:
            if not is_utf8(relative):
                raise UnusableError("its name is not UTF-8; rename the file")
            if "://" in relative:
                raise UnusableError("it is a URL, and nothing is fetched here; download it first, by img2dataset")
            status = check_file(self.root, relative)
        except UnusableError as error:
            return SourceRow(printable(relative), key, None, *facts, problem=str(error))
        return SourceRow(relative, key, WholeFile(relative), *facts, size=status.st_size, mtime_ns=status.st_mtime_ns)

    def _cell_row(self, number: int, values: dict[str, Any]) -> SourceRow:
        status = self.file.stat()
        return SourceRow(
            f"{self.file.name}: row {number}",
            as_text(values.get("key")) or f"{self.file.stem}/{number:09d}",
            TableCell(self.file.name, number, self.columns["bytes"]),
            as_text(values.get("label")),
            as_text(values.get("group")),
            as_text(values.get("domain")),
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )
