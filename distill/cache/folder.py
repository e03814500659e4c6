"""A cache on disk: `cache.json`, the bases of "pca", and one unit a shard under `train/` and `val/`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill.cache.compression import Basis
from distill.cache.key import Fields
from distill.cache.record import LayerName, RecordLayout
from distill.cache.units import UnitPlan
from distill.checkpoint_files import sync_folder, temporary_beside
from distill.data.index import DatasetIndex
from distill.errors import ConfigError, DataError

FORMAT = 1
MANIFEST_NAME = "cache.json"


@dataclass(frozen=True)
class CacheManifest:
    """What a cache holds and what it depends on.

    Attributes:
        key: recipe keys and what they were.
        layout: of a record.
        views: of each training image; validation images have one.
        dims: channels that "pca" keeps at most.
        bases_sha256: of the bases' file, hex; empty without bases.
        errors: of the compression, measured: see `measure_errors`.
        made_with: versions, and the device the compression was measured on.
        engine: how the teachers run: kernels that were measured, and images at a time. All processes that fill the
            cache take these, as others would round differently; no part of the key.
    """

    key: Fields
    layout: RecordLayout
    views: int
    dims: int
    bases_sha256: str
    errors: list[dict[str, Any]]
    made_with: dict[str, str]
    engine: dict[str, str | int] = field(default_factory=dict[str, str | int])

    def text(self) -> str:
        """Return it as JSON."""
        content = {**self.__dict__, "layout": self.layout.as_json()}
        if not self.engine:
            del content["engine"]  # as it was before there was such a field: units name the text by its checksum
        return json.dumps({"format": FORMAT, **content}, indent=1) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 of its text, hex: what units name as theirs."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def views_of(self, split: str) -> int:
        """Return how many views an image of "train" or "val" has."""
        return self.views if split == "train" else 1


class CacheFolder:
    """The files of one cache.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies."""
        return self.path / MANIFEST_NAME

    def read(self) -> CacheManifest:
        """Return the manifest.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        try:
            content: dict[str, Any] = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            content["layout"] = RecordLayout.from_json(content["layout"])
            return CacheManifest(**content)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path} is no cache of teacher states (it has no {MANIFEST_NAME}); fill one with "
                f"`distill cache RECIPE --out {self.path}`, or set model.teacher_states to null."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.manifest_path} cannot be read as a cache's manifest: {error!r}.") from error

    def create(self, manifest: CacheManifest, bases: bytes) -> CacheManifest:
        """Write the manifest unless another process was first; return the one that is there.

        The file is linked, not renamed, to its name: of several processes one wins, on network file systems too.

        Raises:
            DataError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if bases:
                self._write_once(self._bases_path(manifest), bases)
            self._write_once(self.manifest_path, manifest.text().encode())
        except OSError as error:
            raise DataError(f"The folder {self.path} cannot be written: {error.strerror or error}.") from error
        return self.read()

    def _write_once(self, target: Path, content: bytes) -> None:
        with temporary_beside(target) as temporary:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                return
            sync_folder(self.path)

    def _bases_path(self, manifest: CacheManifest) -> Path:
        return self.path / f"bases-{manifest.bases_sha256[:12]}.safetensors"

    def read_bases(self, manifest: CacheManifest) -> dict[LayerName, Basis]:
        """Return the bases of "pca", on the CPU; none for other formats.

        Raises:
            DataError: their file is missing or damaged.
        """
        if not manifest.bases_sha256:
            return {}
        path = self._bases_path(manifest)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest.bases_sha256:
                raise ValueError("its checksum is not the manifest's")
            return unpack_bases(load(content))
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"The bases {path} cannot be read: {error}. Without them the cache is lost; fill another folder."
            ) from error

    def units(self, manifest: CacheManifest, split: str, index: DatasetIndex) -> list[UnitPlan]:
        """Return the units of a split, one a shard, in the order of the index."""
        counts = torch.bincount(torch.from_numpy(index.shard_ids), minlength=len(index.shards)).tolist()
        cache, views = manifest.sha256, manifest.views_of(split)
        return [
            UnitPlan(
                self.path / split / unit_name(shard.domain, shard.name, shard.sha256),
                cache,
                f"{shard.domain}/{shard.name}",
                shard.sha256,
                rows,
                views,
                manifest.layout.num_bytes,
            )
            for shard, rows in zip(index.shards, counts, strict=True)
        ]


def unit_name(domain: str, shard: str, sha256: str) -> str:
    """Return the file name of a shard's unit: plain characters, and never the same for two shards."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{domain}-{shard.removesuffix('.tar')}")[:120]
    tail = hashlib.sha256(f"{domain}/{shard}/{sha256}".encode()).hexdigest()[:12]
    return f"{plain}-{tail}.safetensors"


def pack_bases(bases: Mapping[LayerName, Basis]) -> bytes:
    """Return bases as a safetensors file's bytes; nothing for none."""
    tensors: dict[str, Tensor] = {}
    for (teacher, layer), basis in bases.items():
        tensors |= {f"{teacher}/{layer}/mean": basis.mean, f"{teacher}/{layer}/matrix": basis.matrix}
    return save(tensors) if tensors else b""


def unpack_bases(tensors: Mapping[str, Tensor]) -> dict[LayerName, Basis]:
    """Return the bases that `pack_bases` packed."""
    names = sorted({tuple(name.rsplit("/", 2)[:2]) for name in tensors})
    return {
        (teacher, int(layer)): Basis(tensors[f"{teacher}/{layer}/mean"], tensors[f"{teacher}/{layer}/matrix"])
        for teacher, layer in cast(list[tuple[str, str]], names)
    }
