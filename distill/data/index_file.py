"""A shard's index kept in a file, so that a shard is read whole only once.

An index file is a NumPy archive read with `allow_pickle=False`. It is taken as valid while the shard's size and
modification time (of an object: its ETag, or time of change) are those it was made from; else, or when it is damaged,
it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.data.shard_cache import ShardCache
from distill.data.shard_cache_config import USER_FOLDER, ShardCacheConfig
from distill.data.shard_index import ShardIndex, scan_file, scan_shard
from distill.data.stores import ObjectState, is_remote, name_of, shown
from distill.errors import ConfigError, DataError

FORMAT = "distill-shard-index/2"
INDEX_FOLDER = ".distill-index"

_ARRAYS = {"offsets": np.int64, "sizes": np.int64, "widths": np.int32, "heights": np.int32} | {
    name: np.int32 for name in ("labels", "groups")
}


@dataclass(frozen=True)
class IndexFiles:
    """Where index files are kept, and how shards behind URLs are fetched; travels to worker processes.

    Args:
        index_dir: folder for index files; None means `.distill-index` beside a local shard, and
            ~/.cache/encoder-distill/index for one behind a URL.
        reuse: False reads a shard even when its index file seems to fit.
        shard_cache: where shards behind URLs are put while they are read, and stay as long as there is room.
    """

    index_dir: Path | None = None
    reuse: bool = True
    shard_cache: ShardCacheConfig = field(default_factory=ShardCacheConfig)

    def kept(self, location: str) -> ShardIndex | None:
        """Return a shard's index from its file, or None when there is none that fits the shard as it is now.

        Raises:
            DataError: the shard is missing, may not be read, or its server fails.
            ConfigError: its scheme is not allowed or needs a package that is not installed.
        """
        if not self.reuse:
            return None
        if is_remote(location):
            state = self.shard_cache.stores.state(location)
        else:
            try:
                status = Path(location).stat()
            except OSError as error:
                raise _not_readable(location, error) from error
            state = ObjectState(status.st_size, str(status.st_mtime_ns))
        return load_index(index_file(location, self.index_dir), name_of(location), state)

    def make(self, location: str) -> ShardIndex:
        """Read a whole shard, keep its index in its file, and return it.

        Raises:
            DataError: the shard is missing, empty, damaged, changes meanwhile, holds something that is not allowed, or
                its server fails.
            ConfigError: the index cannot be written, or the shard cannot be fetched as configured.
        """
        target = index_file(location, self.index_dir)
        _check_writable(target.parent)
        try:
            if is_remote(location):
                index = _scan_object(location, ShardCache(self.shard_cache))
            else:
                index = scan_shard(Path(location))
        except OSError as error:
            raise _not_readable(location, error) from error
        save_index(index, target)
        return index


def _scan_object(location: str, cache: ShardCache) -> ShardIndex:
    """Download a shard, read it, and leave it in the cache for training."""
    state = cache.stores.state(location)
    name = hashlib.sha256(f"{location}\0{state.version}".encode()).hexdigest()
    with cache.incoming(location, state.num_bytes, name) as partial:
        cache.stores.download(location, partial, state.num_bytes)
        with partial.open("rb") as file:
            index = scan_file(file, shown(location), name=name_of(location), version=state.version)
        if cache.stores.state(location) != state:
            raise DataError(f"{shown(location)} changed while it was read; index it when it is complete.")
        os.close(cache.adopt(partial, index.sha256))
    return index


def _not_readable(location: str, error: OSError) -> DataError:
    return DataError(f"The shard {shown(location)} cannot be read: {error.strerror or error}.")


def index_file(location: str | Path, index_dir: Path | None) -> Path:
    """Return where a shard's index is kept."""
    location = str(location)
    if is_remote(location):
        folder = shown(location).rpartition("/")[0]
        index_dir = index_dir or Path.home() / USER_FOLDER / "index"
    elif index_dir is None:
        return Path(location).parent / INDEX_FOLDER / f"{name_of(location)}.npz"
    else:
        folder = str(Path(location).parent.resolve())
    # One folder may serve shards of several, where train and val often have the same names.
    return index_dir / f"{name_of(location)}.{hashlib.sha256(folder.encode()).hexdigest()[:12]}.npz"


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
    texts = {entry.name: getattr(index, entry.name) for entry in fields(index) if entry.name not in _ARRAYS}
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


def load_index(target: Path, name: str, state: ObjectState) -> ShardIndex | None:
    """Return the index kept in a file, or None when there is none that fits the shard."""
    try:
        with np.load(target, allow_pickle=False) as archive:
            manifest = json.loads(archive["manifest"].tobytes())
            arrays = {key: archive[key] for key in _ARRAYS}
        if manifest.pop("format") != FORMAT:
            return None
        index = ShardIndex(**manifest, **arrays)
        fits = (index.name, index.num_bytes, index.version) == (name, state.num_bytes, state.version)
        return index if fits and _is_sound(index) else None
    except Exception:
        # Damaged bytes make the readers of ZIP, NumPy and JSON raise anything; what cannot be read is made again.
        return None


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
