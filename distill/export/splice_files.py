"""The files of a spliced VLM: what holds no part of the tower is copied bit for bit, the rest is written anew."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor

from distill.export.contract import CONFIG_FILE
from distill.export.files import cannot_write, write_json, write_safetensors
from distill.export.splice_vlm import INDEX_FILE, Vlm

_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}


def copy_files(vlm: Vlm, directory: Path) -> None:
    """Copy whatever holds no part of the tower, bit for bit; links are followed, as hubs' caches are made of them."""
    rewritten = {CONFIG_FILE, INDEX_FILE, *(vlm.tensors[key].file for key in vlm.tower_keys)}
    try:
        for path in sorted(vlm.directory.iterdir()):
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            elif path.name not in rewritten:
                shutil.copyfile(path, directory / path.name)
    except (OSError, shutil.Error) as error:
        raise cannot_write(directory, cast(Exception, error)) from error


def write_weights(vlm: Vlm, tower: dict[str, Tensor], directory: Path) -> None:
    """Write the files that hold parts of the tower: a tensor goes where its namesake was, others to the first."""
    old = set(vlm.tower_keys)
    files = sorted({vlm.tensors[key].file for key in old})
    places = {key: vlm.tensors[key].file if key in old else files[0] for key in tower}
    for name in files:
        with safe_open(vlm.directory / name, framework="pt") as file:
            metadata: dict[str, str] | None = file.metadata()
            kept = {key: file.get_tensor(key) for key in file.keys() if key not in old}  # noqa: SIM118 - no mapping
        new = {key: tower[key].contiguous() for key, place in places.items() if place == name}
        write_safetensors(directory / name, kept | new, metadata)
    index = vlm.directory / INDEX_FILE
    if index.is_file():
        _write_index(vlm, tower, places, json.loads(index.read_text(encoding="utf-8")), directory)


def _write_index(
    vlm: Vlm, tower: dict[str, Tensor], places: dict[str, str], index: dict[str, Any], directory: Path
) -> None:
    """Write the index with the tower's new keys and size; where nothing changes, the old one stays, byte for byte."""
    removed = set(vlm.tower_keys) - tower.keys()
    weight_map = {key: file for key, file in index["weight_map"].items() if key not in removed} | places
    metadata: dict[str, Any] = dict(index.get("metadata") or {})
    before = [vlm.tensors[key] for key in vlm.tower_keys]
    if isinstance(metadata.get("total_size"), int):
        lost = sum(math.prod(stored.shape) * _BYTES[stored.dtype] for stored in before)
        metadata["total_size"] += sum(tensor.nbytes for tensor in tower.values()) - lost
    if isinstance(metadata.get("total_parameters"), int):
        lost = sum(math.prod(stored.shape) for stored in before)
        metadata["total_parameters"] += sum(tensor.numel() for tensor in tower.values()) - lost
    changed = {**index, "metadata": metadata, "weight_map": weight_map}
    if changed == index:
        shutil.copyfile(vlm.directory / INDEX_FILE, directory / INDEX_FILE)
    else:
        write_json(directory / INDEX_FILE, changed)
