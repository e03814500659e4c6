"""Freed memory stays with the process: what a step frees, the next one takes again, without asking the system.

glibc gives blocks above 32 MB back as soon as they are freed. An activation of a 448 px image is that large, and the
system has to clear each page of it anew: half of the CPU time of an EfficientNet's forward pass on small machines.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES, _TRIM_BYTES = 1 << 30, (1 << 31) - 1
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep up to 2 GiB of freed memory, and blocks of up to 1 GiB among it.

    Resident memory then stays near its highest value. Nothing is done where the environment already sets the allocator
    (`MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`, ...), or where it is another one.

    Returns:
        Whether the allocator took it.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
