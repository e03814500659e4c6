"""Features kept on disk, each under a key of everything that they depend on.

One safetensors file a key, called by the key's SHA-256 and carrying the key itself, so a file that was renamed or made
for another encoder is refused instead of read. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import ConfigError, DataError
from distill.weights_fingerprint import weights_fingerprint

VERSION = 1
"""Raised when decoding, resizing or pooling change, because the same key would then mean other features."""

_META = "key"


class FeatureCache:
    """A folder of cached features.

    Args:
        folder: made when it is missing.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--cache {folder} cannot be made: {error.strerror}. Name another folder.") from error
        self.folder = folder

    def file_of(self, key: Mapping[str, Any]) -> Path:
        """Return where features of that key are kept."""
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()}.safetensors"

    def read(self, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors of that key, or None when there are none.

        Raises:
            DataError: the file is damaged, or carries another key: features of another encoder, view or data set.
        """
        file = self.file_of(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                found = (opened.metadata() or {}).get(_META, "")
                self._require_key(file, found, key)
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
        except (SafetensorError, OSError) as error:
            raise DataError(f"The cached features {file} are damaged: {error}. Remove the file.") from error

    def _require_key(self, file: Path, found: str, key: Mapping[str, Any]) -> None:
        if found == _text(key):
            return
        try:
            other = dict(json.loads(found))
        except ValueError:
            other = {}
        changed = sorted(name for name in {*key, *other} if other.get(name) != json.loads(_text(key)).get(name))
        raise DataError(
            f"The cached features {file} are not of this encoder and data: {', '.join(changed) or 'their key'} "
            "differ(s). Somebody renamed the file; remove it, and the features are computed again."
        )

    def write(self, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key, atomically.

        Raises:
            ConfigError: the file cannot be written.
        """
        target = self.file_of(key)
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            temporary = Path(name)
            try:
                kept = {name: value.contiguous() for name, value in tensors.items()}
                save_file(kept, temporary, metadata={_META: _text(key)})
                temporary.chmod(0o644)  # temporary files are private; features are not
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"--cache {self.folder} cannot be written: {error}. Free space or name another."
            ) from error


def encoder_key(encoder: nn.Module) -> dict[str, Any]:
    """Return what tells an encoder from every other: its class, its configuration, its preprocessing and its weights.

    `weights_fingerprint` samples values and rounds them, which serves to notice another teacher; a student and the same
    student a step later must not be mistaken, so every byte enters besides.
    """
    contract = cast(Encoder, encoder)
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content = tensor.detach().to("cpu").contiguous().flatten()
        if content.numel():
            digest.update(content.view(torch.uint8).numpy().tobytes())
    members = ("embed_dim", "depth", "layer_dims", "patch_size", "num_prefix_tokens", "image_mean", "image_std")
    return {
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "config": hashlib.sha256(repr(encoder).encode()).hexdigest(),
        "preprocessing": {name: getattr(contract, name, None) for name in members},
        "weights": weights_fingerprint(encoder),
        "weights_sha256": digest.hexdigest(),
    }


def rows_key(rows: list[int]) -> str:
    """Return a SHA-256, hex, of the rows that are taken of a data set."""
    return hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **key}, sort_keys=True, separators=(",", ":"))
