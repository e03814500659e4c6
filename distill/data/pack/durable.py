"""Files that are there whole or not at all, whatever kills the process or fills the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

PART_SUFFIX = ".part"


@contextmanager
def durable_file(target: Path) -> Generator[BinaryIO]:
    """Open a temporary file that replaces the target when the block ends without an error, and goes away else.

    It lies in the target's folder, so that the replacement is atomic; its bytes are on disk before it is renamed, and
    the folder's entry before the block ends.

    Raises:
        OSError: the folder cannot be written, or its disk is full.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART_SUFFIX)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_parts(folder: Path) -> int:
    """Remove the temporary files that killed processes have left, and return how many there were."""
    leftovers = [path for path in folder.glob(f".*{PART_SUFFIX}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
