"""Parquet and Arrow files, read a batch at a time by pyarrow; nothing in them is executed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from distill.errors import ConfigError, DataError

_BATCH_ROWS = 4096
_BATCH_IMAGES = 16


def arrow(module: str = "pyarrow") -> Any:
    """Return pyarrow or a module of it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            "Reading Parquet and Arrow files needs pyarrow, which is not installed. "
            "Run: pip install 'encoder-distill[pack]'."
        ) from error


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (arrow("pyarrow.lib").ArrowException, UnicodeDecodeError, KeyError, OSError) as error:
        raise DataError(f"The table {path} cannot be read ({error}); write or copy it again.") from error


def read_schema(path: Path) -> Any:
    """Return a table's `pyarrow.Schema`.

    Raises:
        DataError: the file is missing, damaged or no table.
    """
    with _reading(path):
        if path.suffix == ".parquet":
            return arrow("pyarrow.parquet").read_schema(path)
        with arrow().memory_map(str(path)) as file:
            return arrow("pyarrow.ipc").open_stream(file).schema


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a table's rows, of the columns named only.

    Raises:
        DataError: the file is missing or damaged.
    """
    with _reading(path):
        if not columns:
            # Without columns pyarrow gives batches without rows.
            yield from ({} for _ in range(_count_rows(path)))
            return
        for batch in _batches(path, columns):
            yield from batch.select(list(columns)).to_pylist()


def read_cells(path: Path, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
    """Yield the bytes of some rows of one column; None for an empty cell.

    Args:
        path: a Parquet file, or an Arrow stream.
        column: a column of bytes, or of structures with a field `bytes`, as Hugging Face image columns are.
        rows: row numbers, rising.

    Raises:
        DataError: the file is missing, damaged, or shorter than that.
    """
    with _reading(path):
        batches = _cell_batches(path, column, rows)
        start, stop, values = 0, 0, None
        for row in rows:
            while row >= stop:
                start, values = next(batches, (0, None))
                if values is None:
                    raise DataError(f"The table {path} has no row {row}; it changed since it was listed.")
                stop = start + len(values)
            yield values[row - start].as_py() if values is not None else None


def has_bytes_field(schema: Any, column: str) -> bool:
    """Tell whether a column holds structures with a field `bytes`."""
    kind = schema.field(column).type
    return bool(arrow().types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def is_bytes(schema: Any, column: str) -> bool:
    """Tell whether a column holds bytes."""
    kind, types = schema.field(column).type, arrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(arrow("pyarrow.parquet").read_metadata(path).num_rows)
    return sum(batch.num_rows for batch in _batches(path, ()))


def _batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with arrow("pyarrow.parquet").ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns), use_threads=False)
        return
    # Mapped, not read: a batch's images stay on disk until they are asked for.
    with arrow().memory_map(str(path)) as file:
        yield from arrow("pyarrow.ipc").open_stream(file)


def _cell_batches(path: Path, column: str, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first row, values), skipping what lies between the rows asked for."""
    has_field = has_bytes_field(read_schema(path), column)
    if path.suffix != ".parquet":
        start = 0
        for batch in _batches(path, (column,)):
            yield start, _bytes_of(batch.column(column), has_field)
            start += batch.num_rows
        return
    with arrow("pyarrow.parquet").ParquetFile(path) as file:
        start = 0
        for number in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            if any(start <= row < stop for row in rows):
                projection = [f"{column}.bytes" if has_field else column]
                inside = start
                for batch in file.iter_batches(
                    batch_size=_BATCH_IMAGES, row_groups=[number], columns=projection, use_threads=False
                ):
                    yield inside, _bytes_of(batch.column(0), has_field)
                    inside += batch.num_rows
            start = stop


def _bytes_of(values: Any, has_field: bool) -> Any:
    return arrow("pyarrow.compute").struct_field(values, "bytes") if has_field else values
