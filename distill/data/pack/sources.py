"""Which kind of source a path is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from distill.data.pack.folder import ImageFolder
from distill.data.pack.huggingface import HuggingFaceDataset
from distill.data.pack.table_list import TableList
from distill.data.pack.tables import has_bytes_field, read_schema
from distill.data.pack.tars import WebDatasetTars
from distill.errors import ConfigError, DataError

SourceKind = Literal["folder", "list", "huggingface", "tars"]
OpenedSource = ImageFolder | TableList | HuggingFaceDataset | WebDatasetTars


def tell_kind(path: Path) -> SourceKind:
    """Return what a path looks like.

    A folder with tars is img2dataset's (or any WebDataset) output; one with a `state.json`, a `dataset_dict.json` or
    Parquet files a Hugging Face dataset; any other a folder of images. A `.csv` or `.parquet` file is a list, unless
    Parquet says that it is a Hugging Face dataset's; a pattern of Parquet files is a dataset's split.

    Raises:
        DataError: there is nothing at the path, or a file of no kind known.
    """
    if path.is_dir():
        if any(path.glob("*.tar")):
            return "tars"
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return "huggingface"
        return "huggingface" if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")) else "folder"
    if not path.exists() and path.suffix == ".parquet" and any(path.parent.glob(path.name)):
        return "huggingface"
    if not path.is_file():
        raise DataError(f"There is no {path}; name a folder, a .csv or .parquet list, or a tar.")
    if path.suffix == ".tar":
        return "tars"
    if path.suffix == ".parquet":
        schema = read_schema(path)
        is_hub = b"huggingface" in (schema.metadata or {}) and any(has_bytes_field(schema, n) for n in schema.names)
        return "huggingface" if is_hub else "list"
    if path.suffix.lower() == ".csv":
        return "list"
    raise DataError(f"{path} is no folder, .csv, .parquet or .tar; name one of these.")


def open_source(
    path: Path, kind: SourceKind, *, root: Path | None, columns: Mapping[str, str] | None, folder_labels: bool
) -> OpenedSource:
    """Return the source at a path.

    Args:
        path: where it is.
        kind: what it is.
        root: of the paths in a list; None means the list's folder.
        columns: our name -> the source's name.
        folder_labels: sub-folders of images are classes.

    Raises:
        ConfigError: an option does not fit the kind, or a column is missing.
        DataError: the source cannot be read.
    """
    if root is not None and kind != "list":
        raise ConfigError(f"--root goes with a list of paths, and {path} is of the kind {kind}; leave it out.")
    if columns and kind == "folder":
        raise ConfigError(f"--columns goes with lists, datasets and tars, and {path} is a folder; leave it out.")
    if kind == "folder":
        return ImageFolder(path, has_labels=folder_labels)
    if kind == "huggingface":
        return HuggingFaceDataset(path, columns)
    if kind == "tars":
        return WebDatasetTars(path, columns)
    source = TableList(path, root or path.parent, columns)
    if "bytes" in source.columns and root is not None:
        raise ConfigError(f"--root goes with a list of paths, and {path} holds the bytes; leave it out.")
    return source
