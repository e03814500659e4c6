"""Writing a checkpoint so that a crash or a full disk leaves the one before it intact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from distill.checkpoint import read_checkpoint
from distill.errors import WeightsError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves into the target's own folder, syncs, then renames; loads with `weights_only=True` and nothing else.

    Lightning's own plugin writes its temporary into the system's folder, which may be another device (a rename across
    devices is a copy, not atomic), and does not sync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            WeightsError: the folder cannot be written or the disk is full; an older file under `path` is untouched.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise WeightsError(
                f"The checkpoint {target} could not be written: {error}. Free space there, or move the run by "
                "trainer.default_root_dir; older checkpoints are intact."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a local checkpoint to the CPU."""
        return read_checkpoint(Path(path))


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
