"""What one check found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from distill.errors import DistillError

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes:
        check: its name.
        status: "ok"; "warning": training works, with the drawback that is told; "failed": it does not, or must not.
        found: what was met.
        way_out: what to do; empty where all is well.
    """

    check: str
    status: Status
    found: str
    way_out: str = ""


Check = Callable[[], Verdict]


def run_check(name: str, check: Check) -> Verdict:
    """Return a check's verdict; a check that breaks has failed, with its reason as the finding."""
    try:
        return check()
    except DistillError as error:
        return Verdict(name, "failed", str(error), "Mend what the message names.")
    except Exception as error:  # whatever a broken installation or a full disk does must not end the other checks
        reason = " ".join(str(error).split())[:300]
        return Verdict(name, "failed", f"{type(error).__name__}: {reason}", "This check could not be carried out.")
