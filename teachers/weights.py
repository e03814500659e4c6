"""Reading weight files: safely, strictly, and one tensor at a time.

Safetensors is read wherever it exists. The pickle formats (.pth, .pt, .bin) are read by `torch.load` with
`weights_only=True`, which builds tensors and nothing else; InternViT refuses them altogether.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from teachers.progress import file_progress
from teachers.sources import resolve_path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")

_HASHED_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
_NAMES_SHOWN = 4
_MAPPED_BYTES = 64 << 20


def weights_sha256(weights: str | Path) -> str:
    """Return the SHA-256 of a checkpoint, in hexadecimal: its identity, wherever it lies.

    Args:
        weights: a file, or a directory: then the checksum is over the lines `<sha256>  <name>` of its weight and
            JSON files in order of name, so that `sha256sum * | sha256sum` gives it too.

    Raises:
        FileNotFoundError: the path does not exist, or the directory holds no weight file.
    """
    path = resolve_path(str(weights))
    if path.is_file():
        return _file_sha256(path)
    files = sorted(p for p in path.iterdir() if p.suffix in (*_HASHED_SUFFIXES, ".json"))
    if not any(p.suffix in _HASHED_SUFFIXES for p in files):
        raise FileNotFoundError(f"{path}: no weight file ({', '.join(_HASHED_SUFFIXES)}) in this directory.")
    lines = "".join(f"{_file_sha256(p)}  {p.name}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_sha256(weights: str, expected: str) -> None:
    """Refuse weights whose checksum differs from the recorded one.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: the checksum differs.
    """
    found = weights_sha256(weights)
    if found != expected.lower():
        raise ValueError(
            f"weights {weights!r} have sha256 {found}, expected {expected}: the file is damaged or another one; fetch "
            "it again, or correct `sha256`."
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafetensorsCheckpoint:
    """The tensors of one safetensors file, or of a directory with one or several, found but not yet read.

    Args:
        path: a `.safetensors` file, or a directory with `model.safetensors`, or with shards and their index.
        prefix: tensors may stand under this prefix, as an encoder's do inside a whole model's checkpoint. If any
            does, those outside it belong to other parts and are left out.

    Attributes:
        source: the file that lists the tensors: the safetensors file itself, or the index.
        files: name without prefix -> (file, name in the file).

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: a file is damaged.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.source = _find_source(path)
        if self.source.suffix == ".json":
            listed = _read_index(self.source)
        else:
            with _open(self.source) as file:
                listed = {name: self.source for name in cast(list[str], file.keys())}
        inside = [name for name in listed if prefix and name.startswith(prefix)]
        self.files = {n.removeprefix(prefix) if inside else n: (listed[n], n) for n in inside or listed}

    def check_shapes(self, expected: Mapping[str, torch.Size]) -> None:
        """Compare every shape with the file headers, before any tensor is read.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shape or dtype does not fit, or a shard is damaged or lacks a tensor the index promises.
        """
        for file, names in self._by_file(expected).items():
            with _open(file) as handle:
                present = set(cast(list[str], handle.keys()))
                for name in names:
                    raw = self.files[name][1]
                    if raw not in present:
                        raise ValueError(f"{file}: tensor {raw!r} is missing, though {self.source.name} promises it.")
                    view = handle.get_slice(raw)
                    if str(view.get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                        raise ValueError(
                            f"{file}: tensor {raw!r} is stored as {view.get_dtype()}; expected a floating-point type. "
                            "Quantised checkpoints cannot be read: use the original one."
                        )
                    if tuple(view.get_shape()) != tuple(expected[name]):
                        raise ValueError(
                            f"{file}: tensor {raw!r} has shape {tuple(view.get_shape())}, but the architecture asked "
                            f"for needs {tuple(expected[name])}; choose the architecture these weights are of."
                        )

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)` file by file, each a view of the mapped file: copy it and let it go."""
        grouped = self._by_file(names)
        with file_progress(len(grouped)) as progress:
            for file, names_in_file in progress.track(grouped.items(), description="reading weights"):
                yield from self._tensors_of(file, names_in_file)

    def _tensors_of(self, file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        # Pages that were read count as this process's memory while the file is mapped: it is mapped anew now and then.
        remaining = list(reversed(names))
        while remaining:
            mapped_bytes = 0
            with _open(file) as handle:
                while remaining and mapped_bytes < _MAPPED_BYTES:
                    name = remaining.pop()
                    tensor = cast(Tensor, handle.get_tensor(self.files[name][1]))
                    mapped_bytes += tensor.nbytes
                    yield name, tensor
                    del tensor  # or it would keep the file mapped

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        grouped: dict[Path, list[str]] = {}
        for name in names:
            grouped.setdefault(self.files[name][0], []).append(name)
        return grouped


def _find_source(path: Path) -> Path:
    if path.is_file():
        if path.suffix != SAFETENSORS_SUFFIX:
            raise ValueError(
                f"{path}: expected a {SAFETENSORS_SUFFIX} file or a directory of them; pickle files are not read here, "
                "as they can run code. Convert it with safetensors.torch.save_file."
            )
        return path
    for name in (SINGLE_NAME, INDEX_NAME):
        if (path / name).is_file():
            return path / name
    found = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else []
    raise FileNotFoundError(
        f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} in this directory (it has {', '.join(found) or 'nothing'}); "
        "download the complete release, weights in safetensors format."
    )


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [shard for shard in weight_map.values() if Path(str(shard)).name != str(shard)]
        if outside:
            raise ValueError(f"the shard {outside[0]!r} lies outside the release's directory")
        return {str(name): index.parent / str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r}); download it again.") from error


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the index names it; download this shard.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or truncated ({error}; {path.stat().st_size} bytes); download it again."
        ) from error


def check_names(found: Iterable[str], expected: Iterable[str], source: Path) -> None:
    """Refuse a checkpoint that lacks a tensor or has one too many.

    Raises:
        ValueError: the names differ; the message has the first few of each kind.
    """
    found, expected = set(found), set(expected)
    if missing := sorted(expected - found):
        raise ValueError(
            f"{source}: {_listing(missing)} missing; the file is incomplete, or is of another architecture "
            f"({len(found & expected)} of {len(expected)} expected tensors are there)."
        )
    if unexpected := sorted(found - expected):
        raise ValueError(
            f"{source}: {_listing(unexpected)} unexpected; choose the architecture that these weights are of."
        )


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{f' and {rest} more' if rest > 0 else ''} are"


def assign_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of the parameter called `name`, frozen; unlike copying, this also works from meta."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def read_state_dict(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file, on the CPU.

    A training checkpoint that holds its weights under `state_dict` or `model` is unwrapped, and the `module.` that
    data-parallel training puts in front of names is taken off.

    Args:
        path: the file.
        prefix: if any tensor stands under this prefix, only those are returned, without it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, holds something other than named tensors, or would have to run code.
    """
    if path.suffix == SAFETENSORS_SUFFIX:
        checkpoint = SafetensorsCheckpoint(path, prefix)
        return dict(checkpoint.tensors(checkpoint.files))
    tensors = {name.removeprefix("module."): value for name, value in _read_pickle(path).items()}
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return inside or tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if path.suffix not in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; use {SAFETENSORS_SUFFIX} or {', '.join(PICKLE_SUFFIXES)}.")
    if _is_torchscript(path):
        raise ValueError(
            f"{path}: a TorchScript archive, which holds code (OpenAI published CLIP so); use a safetensors version of "
            "these weights."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: not a file of plain tensors, or damaged ({reason}); download it again, or use a safetensors "
            "version of these weights. Files that need code to load are refused."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(inner := cast(dict[str, Any], loaded).get(wrapper), dict):
            loaded = cast(dict[str, Any], inner)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of named tensors.")
    tensors = cast(dict[str, Any], loaded)
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        odd = next(name for name, value in tensors.items() if not isinstance(value, Tensor))
        raise ValueError(f"{path}: entry {odd!r} is no tensor; give the file of the weights alone.")
    return tensors


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` into `module`: all of its parameters and buffers, and nothing else.

    Args:
        module: where they go.
        tensors: by name.
        source: the file they come from, for messages.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs.
    """
    expected = module.state_dict()
    check_names(tensors, expected, source)
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {tuple(value.shape)}, but the model needs "
                f"{tuple(expected[name].shape)}; choose the model and image size that these weights are of."
            )
    module.load_state_dict(tensors, strict=True)
