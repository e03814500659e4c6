"""Weight files on disk as one flat mapping of tensors; nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_DIRECTORY_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""What a weight directory may hold, in the order of preference."""

_CONVERT = (
    "Convert it once: python -c \"import torch; from safetensors.torch import save_file; m = torch.jit.load('{path}', "
    "map_location='cpu'); save_file({{k: v.float().clone() for k, v in m.state_dict().items()}}, 'clip.safetensors')\""
)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file or directory, on the CPU, as they are stored.

    Args:
        path: a `.safetensors` file, a pickled state dict (`.pt`, `.pth`, `.bin`; read with `weights_only=True`), a
            sharded index (`*.index.json`), or a directory that holds one of them under its usual name.

    Returns:
        Tensors by name. A checkpoint that nests them under `state_dict` is unwrapped, and the `module.` that
        data-parallel training puts in front of every name is removed.

    Raises:
        FileNotFoundError: the path, a shard, or every usual file of a directory is missing.
        ValueError: the file is damaged, is a TorchScript archive, or holds something other than named tensors.
    """
    file = _find_file(Path(path))
    if file.name.endswith(".index.json"):
        return _read_sharded(file)
    return _read_file(file)


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in _DIRECTORY_FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(_DIRECTORY_FILES)} in it.")
    if not path.is_file():
        raise FileNotFoundError(
            f"The weight file {path} does not exist. Give the path of a file or directory, or the word `random`."
        )
    return path


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}. Fetch the file again.") from error
    if _is_torchscript(file):
        raise ValueError(
            f"{file} is a TorchScript archive, which is a program: it is not loaded here. {_CONVERT.format(path=file)}"
        )
    try:
        loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read as a state dict of tensors: {_first_line(error)} It is truncated, or holds more "
            "than tensors. Fetch the file again, or save its state dict as safetensors."
        ) from error
    return _named_tensors(loaded, file)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        # torch.save never writes `constants.pkl`; torch.jit.save always does.
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _named_tensors(loaded: object, file: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        entries = cast(Mapping[Any, Any], loaded)
        nested = entries.get("state_dict", entries)
        if isinstance(nested, Mapping):
            named = cast(Mapping[Any, Any], nested)
            tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            if tensors and all(isinstance(key, str) for key in tensors):
                return {key.removeprefix("module."): value for key, value in cast(dict[str, Tensor], tensors).items()}
    raise ValueError(f"{file} holds no tensors by name. Save a state dict: a mapping from names to tensors.")


def _read_sharded(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = cast(dict[str, str], json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index: {error!r}. Fetch the file again.") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        file = index.parent / shard
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; a shard must lie beside its index. Fetch it again.")
        if not file.is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is missing beside it. Fetch it again.")
        state.update(_read_file(file))
    missing = sorted(weight_map.keys() - state.keys())
    if missing:
        raise ValueError(f"{index} promises {len(missing)} tensors no shard holds (first: {missing[0]}). Fetch again.")
    return state
