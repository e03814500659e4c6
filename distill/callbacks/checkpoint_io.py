"""Writing a checkpoint so that a crash or a full disk leaves the one before it intact."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from distill import __version__
from distill.checkpoint import read_checkpoint
from distill.checkpoint_files import Entry, HashingFile, manifest_path, storage_bytes, write_checkpoint
from distill.errors import ConfigError, WeightsError

TEACHERS_KEY = "teacher_fingerprints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves into the target's own folder, syncs, renames, and keeps a manifest; loads with `weights_only=True` only.

    Lightning's own plugin builds the whole file in memory, writes its temporary into the system's folder, which may be
    another device (a rename across devices is a copy, not atomic), and does not sync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; a file `last.ckpt` that is there stays as `previous.ckpt`.

        Raises:
            ConfigError: `path` is an URL.
            WeightsError: the folder cannot be written or the disk is full; an older file under `path` is untouched.
        """
        target, needed = local_path(path), storage_bytes(checkpoint)

        def write(file: HashingFile) -> None:
            torch.save(checkpoint, cast(Any, file))

        def describe(sha256: str, size: int) -> Entry:
            steps = {key: int(checkpoint.get(key, 0)) for key in ("global_step", "epoch")}
            teachers = cast(dict[str, str], checkpoint.get(TEACHERS_KEY, {}))
            return Entry(sha256=sha256, bytes=size, versions=versions(), teachers=teachers, **steps)

        try:
            write_checkpoint(target, write, describe, needed_bytes=needed)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise WeightsError(
                f"The checkpoint {target} of about {needed:,} bytes could not be written: {error}. Free space there, "
                "or move the run by trainer.default_root_dir; older checkpoints are intact."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a local checkpoint to the CPU, checked against its manifest.

        Raises:
            ConfigError: `path` is an URL.
            WeightsError: the file is missing or damaged, or holds anything but tensors and plain values.
        """
        return read_checkpoint(local_path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint that a `ModelCheckpoint` no longer keeps, and its manifest."""
        file = local_path(path)
        file.unlink(missing_ok=True)
        manifest_path(file).unlink(missing_ok=True)


def local_path(path: str | Path) -> Path:
    """Return a path of this machine's file system.

    Raises:
        ConfigError: it is an URL.
    """
    if "://" in str(path):
        raise ConfigError(
            f"The checkpoint {path} is an URL; checkpoints are read from and written to folders only, where a rename "
            "is atomic. Copy it to a folder, or mount the store, and name that."
        )
    return Path(path)


def versions() -> dict[str, str]:
    """Return the versions of what writes a checkpoint."""
    return {
        "distill": __version__,
        "lightning": lightning.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
