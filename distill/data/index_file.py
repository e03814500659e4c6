"""A shard's index kept in a file, so that a shard is read whole only once.

An index file is a NumPy archive read with `allow_pickle=False`. It is taken as valid while the shard's size and
modification time are those it was made from; else, or when it is damaged, it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data.shard_index import ShardIndex, scan_shard
from distill.errors import ConfigError, DataError

FORMAT = "distill-shard-index/1"
INDEX_FOLDER = ".distill-index"

_ARRAYS = {"offsets": np.int64, "sizes": np.int64, "widths": np.int32, "heights": np.int32} | {
    name: np.int32 for name in ("labels", "groups")
}


def read_shard_index(shard: Path, *, index_dir: Path | None = None, reuse: bool = True) -> ShardIndex:
    """Return a shard's index, from its index file when that still fits, else by reading the shard.

    Args:
        shard: a plain tar.
        index_dir: folder for index files; None means `.distill-index` beside the shard.
        reuse: False reads the shard even when its index file seems to fit.

    Raises:
        DataError: the shard is missing, empty, damaged, or holds something that is not allowed.
        ConfigError: the index cannot be written.
    """
    target = index_file(shard, index_dir)
    try:
        status = shard.stat()
        kept = load_index(target, shard.name, status.st_size, status.st_mtime_ns) if reuse else None
        if kept is not None:
            return kept
        _check_writable(target.parent)
        index = scan_shard(shard)
    except OSError as error:
        raise DataError(f"The shard {shard} cannot be read: {error.strerror or error}.") from error
    save_index(index, target)
    return index


def index_file(shard: Path, index_dir: Path | None) -> Path:
    """Return where a shard's index is kept."""
    if index_dir is None:
        return shard.parent / INDEX_FOLDER / f"{shard.name}.npz"
    # One folder may serve shards of several, where train and val often have the same names.
    folder = hashlib.sha256(str(shard.parent.resolve()).encode()).hexdigest()[:12]
    return index_dir / f"{shard.name}.{folder}.npz"


def _check_writable(folder: Path) -> None:
    """Fail before a long scan, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"The index cannot be written to {folder} ({error.strerror or error}); set index_dir (data.index_dir, or "
        "--index_dir) to a folder that can be written, with some free space."
    )


def save_index(index: ShardIndex, target: Path) -> None:
    """Write an index file, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written, or its disk is full.
    """
    texts = {field.name: getattr(index, field.name) for field in fields(index) if field.name not in _ARRAYS}
    manifest = json.dumps({"format": FORMAT, **texts}, ensure_ascii=False).encode()
    buffer = BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez(buffer, allow_pickle=False, manifest=np.frombuffer(manifest, dtype=np.uint8), **arrays)
    temporary = None
    try:
        # In the same folder, so that the replacement is atomic.
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise _not_writable(target.parent, error) from error


def load_index(target: Path, name: str, num_bytes: int, mtime_ns: int) -> ShardIndex | None:
    """Return the index kept in a file, or None when there is none that fits the shard."""
    try:
        with np.load(target, allow_pickle=False) as archive:
            manifest = json.loads(archive["manifest"].tobytes())
            arrays = {key: archive[key] for key in _ARRAYS}
        if manifest.pop("format") != FORMAT:
            return None
        index = ShardIndex(**manifest, **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    fits = (index.name, index.num_bytes, index.mtime_ns) == (name, num_bytes, mtime_ns)
    return index if fits and _is_sound(index) else None


def _is_sound(index: ShardIndex) -> bool:
    """Tell whether the arrays agree with each other and point into the shard."""
    shapes = all(
        getattr(index, name).shape == (len(index),) and getattr(index, name).dtype == kind
        for name, kind in _ARRAYS.items()
    )
    if not shapes or not len(index):
        return False
    inside = bool((index.offsets >= 0).all() and (index.sizes >= 0).all())
    inside = inside and bool((index.offsets + index.sizes <= index.num_bytes).all())
    labels = _is_within(index.labels, index.label_names)
    return inside and labels and _is_within(index.groups, index.group_names)


def _is_within(codes: NDArray[np.int32], names: list[str]) -> bool:
    return int(codes.min()) >= -1 and int(codes.max()) < len(names)
