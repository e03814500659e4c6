"""Which checkpoint a run goes on from, and what it leaves of the logs and checkpoints that lie in its folder."""

from __future__ import annotations

import csv
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distill.checkpoint import TRAINING_STATE, newest_verified, read_checkpoint
from distill.errors import ConfigError, WeightsError

RESUME_POINT_KEY = "resume_point"
FOLDERS = ("ledger", "non_finite", "failures", "tensorboard", "initial", "checkpoints")
"""What a run keeps beside its recipe and its log, and a new run in the same folder begins anew."""


@dataclass(frozen=True)
class ResumeFrom:
    """A checkpoint to go on from.

    Attributes:
        path: the file.
        global_step: optimiser steps done.
        validation_is_due: whether the validation after that step was not finished.
        notices: what to tell the user.
    """

    path: Path
    global_step: int
    validation_is_due: bool
    notices: tuple[str, ...] = ()


def resume_from(run_dir: Path, resume: str, ckpt_path: str | Path | None) -> ResumeFrom | None:
    """Return the checkpoint that `--resume` or `--ckpt_path` asks for; None means a new run.

    Args:
        run_dir: where `auto` looks.
        resume: "no", "auto" (the newest checkpoint in `checkpoints/` that verifies), or a file.
        ckpt_path: Lightning's own flag, a file.

    Raises:
        ConfigError: both flags are given, or an URL.
        WeightsError: there are checkpoints and none verifies, or the named one cannot be used.
    """
    if resume != "no" and ckpt_path:
        raise ConfigError(f"--resume {resume} and --ckpt_path {ckpt_path} are both given; give one of them.")
    if resume == "auto":
        return _newest(run_dir / "checkpoints")
    named = ckpt_path or (None if resume == "no" else resume)
    if named is None:
        return None
    if "://" in str(named):
        raise ConfigError(f"The checkpoint {named} is an URL; copy it to a folder, or mount the store, and name that.")
    return _point(Path(named), [])


def _newest(folder: Path) -> ResumeFrom | None:
    path, passed_over = newest_verified(folder, needed=TRAINING_STATE)
    if path is not None:
        return _point(path, [f"Passed over: {reason}" for reason in passed_over])
    if passed_over:
        reasons = "".join(f"\n  {reason}" for reason in passed_over)
        raise WeightsError(
            f"--resume auto: {folder} holds checkpoints, and none can be used:{reasons}\nRestore one, name another by "
            "--resume PATH, or start anew with --resume no, which moves them to earlier-N/."
        )
    return None


def _point(path: Path, notices: list[str]) -> ResumeFrom:
    checkpoint = read_checkpoint(path)
    step = int(checkpoint.get("global_step", 0))
    place = cast(dict[str, Any], checkpoint.get(RESUME_POINT_KEY, {}))
    notices = [*notices, f"Going on from {path}, step {step}."]
    return ResumeFrom(path, step, bool(place.get("validation_is_due", False)), tuple(notices))


def make_room(run_dir: Path, start: ResumeFrom | None) -> None:
    """Keep what lies in the run directory from being overwritten or said twice, before training begins.

    A run that goes on in its own folder closes the log of what was done. Any other begins anew there: what an earlier
    run left moves to `earlier-1/`, ...

    Args:
        run_dir: the run's folder.
        start: what the run goes on from; None for a new one.
    """
    if start is not None and start.path.resolve().parent == (run_dir / "checkpoints").resolve():
        cut_metrics(run_dir, start)
    elif folder := set_earlier_run_aside(run_dir):
        print(f"What an earlier run left in {run_dir} is now in {folder}.", file=sys.stderr)


def set_earlier_run_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's logs, reports, checkpoints and initial weights to `earlier-N/`, before a new run begins.

    Returns:
        The folder, or None where there was nothing.
    """
    found = [*run_dir.glob("metrics*.csv"), *(run_dir / name for name in FOLDERS)]
    found = [path for path in found if path.exists()]
    if not found:
        return None
    folder = _next(run_dir, "earlier-{}")
    folder.mkdir()
    # Checkpoints last: a kill in between leaves them where the next start finds them.
    for path in [*(p for p in found if p.name != "checkpoints"), *(p for p in found if p.name == "checkpoints")]:
        path.replace(folder / path.name)
    return folder


def cut_metrics(run_dir: Path, point: ResumeFrom) -> None:
    """Close the log of what was done so far: `metrics.csv` becomes `metrics-1.csv`, ..., without steps done again.

    A killed run has logged steps that come after its last checkpoint; the resumed run does and logs them again.
    """
    current = run_dir / "metrics.csv"
    if current.is_file():
        current.replace(_next(run_dir, "metrics-{}.csv"))
    for file in run_dir.glob("metrics-*.csv"):
        text = file.read_text(encoding="utf-8")
        kept = _kept_rows(text, point)
        if kept != text:
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            temporary.write_text(kept, encoding="utf-8")
            temporary.replace(file)


def _kept_rows(text: str, point: ResumeFrom) -> str:
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    rows = list(csv.DictReader(io.StringIO(whole, newline="")))
    kept = [row for row in rows if _is_done(row, point)]
    if len(kept) == len(rows) and whole == text:
        return text
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(kept)
    return out.getvalue()


def _is_done(row: dict[str, str], point: ResumeFrom) -> bool:
    """Whether a row is of a step that the checkpoint has behind it; training step s is logged as s - 1."""
    step = int(row["step"])
    if step == 0 and point.global_step > 0 and "loss/total" in row and not row["loss/total"]:
        return True  # the validation before the first step, or the first step's other values
    is_validation = any(value for key, value in row.items() if key.startswith("val/"))
    if is_validation and point.validation_is_due:
        return step < point.global_step - 1
    return step < point.global_step


def _next(run_dir: Path, pattern: str) -> Path:
    number = 1
    while (run_dir / pattern.format(number)).exists():
        number += 1
    return run_dir / pattern.format(number)
