"""A Hugging Face image dataset on disk: `save_to_disk`'s Arrow files, or a folder of Parquet files.

Both are read by pyarrow itself, a batch at a time: no dataset script runs, and the package `datasets` is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from distill.data.pack.columns import check_columns
from distill.data.pack.roots import require_inside
from distill.data.pack.rows import SourceRow, TableCell, as_text
from distill.data.pack.tables import has_bytes_field, is_bytes, read_columns, read_schema
from distill.errors import ConfigError, DataError

# As the hub numbers the files of a split: train-00000-of-00003.parquet.
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+\.parquet$")

COLUMNS = ("image", "key", "label", "group", "domain")


class HuggingFaceDataset:
    """The rows of one split, file after file.

    The image is the only image column, or the one that --columns.image names; the label is a column `label` or the one
    named, its numbers written as the class names that the dataset keeps. Other columns are used only when named.

    Args:
        root: a folder of `save_to_disk` (one split), a folder with the Parquet files of one split, one Parquet file, or
            a pattern of file names such as `data/train-*.parquet`.
        columns: our name -> the dataset's name.

    Raises:
        ConfigError: there is no image column or several, or one that is named is missing.
        DataError: the folder holds no dataset, or several splits.
    """

    def __init__(self, root: Path, columns: Mapping[str, str] | None) -> None:
        self.root = root.resolve() if root.is_dir() else root.parent.resolve()
        self.files = _data_files(self.root) if root.is_dir() else _matching(self.root, root.name)
        for file in self.files:
            require_inside(self.root, file)
        first = self.root / self.files[0]
        schema = read_schema(first)
        chosen = check_columns(schema.names, COLUMNS, columns or {}, first)
        self.image = chosen.pop("image", None) or _only_image(schema, first)
        if "label" in schema.names:
            chosen.setdefault("label", "label")
        self.columns = chosen
        self.may_name_domains = "domain" in chosen
        self.class_names = _class_names(schema, self.root, chosen.get("label"))

    def rows(self) -> Iterator[SourceRow]:
        """Yield a row for each example."""
        theirs = list(dict.fromkeys(self.columns.values()))
        for file in self.files:
            name = file.as_posix()
            status = (self.root / file).stat()
            for number, values in enumerate(read_columns(self.root / file, theirs)):
                facts = {ours: values[column] for ours, column in self.columns.items()}
                yield SourceRow(
                    f"{name}: row {number}",
                    as_text(facts.get("key")) or f"{file.with_suffix('').as_posix()}/{number:09d}",
                    TableCell(name, number, self.image),
                    self._label(facts.get("label")),
                    as_text(facts.get("group")),
                    as_text(facts.get("domain")),
                    size=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                )

    def _label(self, value: object) -> str | None:
        if not self.class_names or not isinstance(value, int):
            return as_text(value)
        # -1 stands for "no label" in the test splits of the hub.
        return self.class_names[value] if 0 <= value < len(self.class_names) else None


def _data_files(root: Path) -> list[Path]:
    if (root / "dataset_dict.json").exists():
        splits = _read_json(root / "dataset_dict.json").get("splits", [])
        raise DataError(f"{root} holds the splits {', '.join(splits)}; name one of them: {root}/<split>.")
    if (root / "state.json").exists():
        state = _read_json(root / "state.json")
        names = [entry["filename"] for entry in state.get("_data_files", [])]
        if state.get("_indices_data_files"):
            raise DataError(f"{root} was saved with a selection of rows; load and save it again with `datasets`.")
    else:
        # Sorted by their parts, so that the order does not depend on the file system.
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet") if path.is_file())
        splits = sorted({_SHARD_NUMBER.sub("", name) for name in names if _SHARD_NUMBER.search(name)})
        if len(splits) > 1:
            # Training on a test split is a fault that nobody would see.
            raise DataError(
                f"{root} holds several splits: {', '.join(splits)}; name one by a pattern, such as "
                f"'{root}/{splits[0]}-*.parquet'."
            )
    if not names:
        raise DataError(f"{root} has neither a state.json with Arrow files nor *.parquet; name a dataset's folder.")
    return [Path(name) for name in names]


def _matching(folder: Path, pattern: str) -> list[Path]:
    if (folder / pattern).is_file():
        return [Path(pattern)]
    return sorted(path.relative_to(folder) for path in folder.glob(pattern) if path.is_file())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the dataset again.") from error


def _only_image(schema: Any, file: Path) -> str:
    names = [name for name in schema.names if has_bytes_field(schema, name)]
    names = names or [name for name in schema.names if is_bytes(schema, name)]
    if len(names) != 1:
        raise ConfigError(
            f"{file} has {len(names)} image columns ({', '.join(names) or 'of ' + ', '.join(schema.names)}); name the "
            "one to pack by --columns.image=NAME."
        )
    return names[0]


def _class_names(schema: Any, root: Path, label: str | None) -> Sequence[str]:
    """Return the names of a `ClassLabel` column, empty for any other."""
    kept = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(kept)["info"]["features"] if kept else {}
    except (ValueError, KeyError, TypeError):
        features = {}
    if not features and (root / "dataset_info.json").exists():
        features = _read_json(root / "dataset_info.json").get("features") or {}
    feature = features.get(label, {})
    return feature.get("names", []) if feature.get("_type") == "ClassLabel" else []
