"""Checks of the machine: versions, devices, precision, disk and shared memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distill.accelerators import GIB, measured_tflops, recognise_accelerator
from distill.doctor.verdict import Verdict

PACKAGES = ("torch", "lightning", "timm", "pillow", "safetensors", "jsonargparse", "numpy")
BAD_VERSIONS = {
    "torch": ({"2.13.0"}, "excluded by this project as faulty", "pip install 'torch>=2.11,!=2.13.0'"),
    "lightning": (
        {"2.6.2", "2.6.3"},
        "a malicious release",
        "uninstall it, change every credential this machine held, and pip install 'lightning>=2.6.4'",
    ),
}
"""Package -> versions, what is wrong with them, and the way out."""

MINIMUM = {
    "torch": ((2, 11), "the code uses what came with it"),
    "lightning": ((2, 6, 4), "earlier ones were not tested"),
    "pillow": ((13, 0), "earlier ones have a heap overflow in the JPEG decoder"),
}
SLOW_DISK_MB_PER_S = 50.0
SLOW_FSYNC_MS = 100.0
LEAST_FREE_GIB = 2.0
_WRITTEN_BYTES = 64 << 20
_SYNCS = 5
_PROBE_SIDE = 256


def check_versions() -> Verdict:
    """Compare the installed versions with those known to be bad."""
    installed: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            faults.append((f"{name} is not installed", f"pip install {name}"))
    faults += [fault for name, found in installed.items() if (fault := version_fault(name, found))]
    listed = ", ".join([f"Python {platform.python_version()}", *(f"{name} {v}" for name, v in installed.items())])
    if faults:
        return Verdict(
            "versions", "failed", "; ".join(fault for fault, _ in faults), "; ".join(out for _, out in faults)
        )
    return Verdict("versions", "ok", listed)


def version_fault(name: str, found: str) -> tuple[str, str] | None:
    """Return what is wrong with a version of a package and the way out; None if nothing is known against it."""
    public = found.partition("+")[0]
    versions, reason, way_out = BAD_VERSIONS.get(name, (set[str](), "", ""))
    if public in versions:
        return f"{name} {found}: {reason}", way_out
    least, why = MINIMUM.get(name, ((), ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", public))
    if numbers < least:
        wanted = ".".join(str(number) for number in least)
        return f"{name} {found} is older than {wanted}: {why}", f"pip install '{name}>={wanted}'"
    return None


def check_device() -> Verdict:
    """Say what there is to train on."""
    if torch.cuda.is_available():
        names: list[str] = []
        for number in range(torch.cuda.device_count()):
            free, total = (size / GIB for size in torch.cuda.mem_get_info(number))
            name = torch.cuda.get_device_name(number)
            known = recognise_accelerator(name, total)
            peak = f", {known.peak_tflops:g} TFLOP/s by its data sheet" if known else ""
            names.append(f"{name}, {free:.0f} of {total:.0f} GiB free{peak}")
        return Verdict("device", "ok", "; ".join(names))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"no GPU; {cores} CPU cores, torch uses {torch.get_num_threads()}"
    return Verdict("device", "warning", found, "The demo and small recipes train on a CPU; the 6B teacher needs a GPU.")


def check_precision(wanted: str | None = None) -> Verdict:
    """Measure matrix products in float32 and bfloat16.

    Args:
        wanted: the recipe's `trainer.precision`; None means that none is set, so that the faster one is taken.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = None if device.type == "cuda" else _PROBE_SIDE
    single, half = (measured_tflops(device, dtype, side=side) for dtype in (torch.float32, torch.bfloat16))
    found = f"float32 {single:.3g} TFLOP/s, bfloat16 {half:.3g}: {half / single:.2g} times as fast"
    if wanted is not None and "bf16" in wanted and half < single:
        return Verdict("precision", "warning", found, f"trainer.precision is {wanted}; set 32-true, or leave it out.")
    return Verdict("precision", "ok", found)


def check_disk(folder: Path, needed_bytes: int = 0) -> Verdict:
    """Measure writing and flushing in a run's folder, and look at the room that is left.

    Args:
        folder: the run's folder; where it does not exist, the nearest that does.
        needed_bytes: what the run is going to keep there.
    """
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    room = f"{free / GIB:.1f} GiB free"
    if free < max(needed_bytes, _WRITTEN_BYTES):
        way_out = f"Make room, or set trainer.default_root_dir elsewhere: {needed_bytes / GIB:.1f} GiB are needed."
        return Verdict("disk of the run folder", "failed", room, way_out)
    rate, sync_ms = write_speed(place)
    found = f"{room}, {rate:.0f} MB/s written, fsync {sync_ms:.1f} ms"
    if rate < SLOW_DISK_MB_PER_S or sync_ms > SLOW_FSYNC_MS:
        return Verdict("disk of the run folder", "warning", found, "Checkpoints will be slow; use a local disk.")
    if free < LEAST_FREE_GIB * GIB:
        return Verdict("disk of the run folder", "warning", found, "Little room for checkpoints and logs; make some.")
    return Verdict("disk of the run folder", "ok", found)


def check_shared_memory(needed_bytes: int = 0, folder: Path = Path("/dev/shm")) -> Verdict:
    """Look at the memory through which loader processes hand batches over.

    Args:
        needed_bytes: what the batches on their way take.
        folder: where it is mounted.
    """
    if not folder.is_dir():
        return Verdict("shared memory", "warning", f"no {folder} here", "Set data.num_workers to 0 if loading fails.")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free"
    if free < max(needed_bytes, _WRITTEN_BYTES):
        way_out = "Give the container more (docker run --shm-size 8g), or lower data.num_workers or the batch."
        return Verdict("shared memory", "failed", f"{found}, {needed_bytes / GIB:.2f} needed", way_out)
    rate, _ = write_speed(folder)
    return Verdict("shared memory", "ok", f"{found}, {rate:.0f} MB/s written")


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    absolute = folder.expanduser().absolute()
    return next(place for place in (absolute, *absolute.parents) if place.is_dir())


def write_speed(folder: Path) -> tuple[float, float]:
    """Return MB a second for a flushed file of 64 MiB, and the time of one small fsync in ms; leaves nothing behind.

    Raises:
        OSError: the folder cannot be written.
    """
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".distill-doctor-") as file:
        began = time.perf_counter()
        for _ in range(_WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = _WRITTEN_BYTES / 1e6 / (time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(_SYNCS):
            file.write(block[:4096])
            file.flush()
            os.fsync(file.fileno())
        return rate, (time.perf_counter() - began) / _SYNCS * 1000
