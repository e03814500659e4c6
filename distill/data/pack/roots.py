"""Names inside a source's root; no link leads out of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from distill.data.tar_members import MAX_MEMBER_BYTES
from distill.errors import DataError

REFUSED = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
"""What a path itself is to blame for."""


class UnusableError(Exception):
    """One image cannot be packed; the message is the reason that the quarantine list gives."""


def resolve_inside(root: Path, relative: str) -> Path:
    """Return the real path of a file under a root.

    Args:
        root: the source's root, resolved.
        relative: the file's name in it.

    Raises:
        UnusableError: the file, or a link on the way to it, lies outside the root, or there is a loop of links.
    """
    try:
        path = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UnusableError(f"its path cannot be resolved ({error})") from error
    if not path.is_relative_to(root):
        raise UnusableError("it leads out of the source folder; copy the file there, or name a higher --root")
    return path


def check_file(root: Path, relative: str) -> os.stat_result:
    """Return the status of a regular file under a root.

    Raises:
        UnusableError: there is none, it lies outside, it is no regular file, or it is larger than a shard's member may
            be.
        OSError: the storage fails.
    """
    try:
        status = resolve_inside(root, relative).stat()
    except FileNotFoundError:
        raise UnusableError("the file does not exist") from None
    except OSError as error:
        if error.errno not in REFUSED:
            # The storage's fault, not the image's: quarantine would lose what is there.
            raise
        raise UnusableError(f"the file cannot be reached ({error.strerror or error})") from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would wait for ever.
        raise UnusableError("it is no regular file")
    if status.st_size > MAX_MEMBER_BYTES:
        raise UnusableError(f"it has {status.st_size:,} bytes; {MAX_MEMBER_BYTES:,} are allowed")
    return status


def require_inside(root: Path, file: Path) -> None:
    """Check that a tar or table of a source lies in it: one that does not is no bad image, and nothing of it is read.

    Raises:
        DataError: it leads out of the root.
    """
    try:
        resolve_inside(root, file.as_posix())
    except UnusableError as error:
        raise DataError(f"{root / file}: {error}.") from error


def printable(name: str) -> str:
    r"""Return a file name as text that every JSON reader takes; bytes that are not UTF-8 are written as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(name: str) -> bool:
    """Tell whether a file name, as Python gives it, is valid UTF-8 on disk."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
