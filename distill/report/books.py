"""What a run consumed: its data ledger, its throughput, and what that cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from distill.probe.number_text import count_text
from distill.report.metrics_csv import Series

RATE = "throughput/images_per_s"
TOP_REASONS = 5
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class LedgerRow:
    """One domain's samples; planned = seen + quarantined."""

    domain: str
    planned: int
    seen: int
    quarantined: int


@dataclass(frozen=True)
class LedgerFacts:
    """A run's data ledger.

    Attributes:
        rows: by domain, then all domains together.
        reasons: (reason, samples) of the bad samples, the most frequent first.
        absent: why there is no ledger, or "".
    """

    rows: tuple[LedgerRow, ...] = ()
    reasons: tuple[tuple[str, int], ...] = ()
    absent: str = ""

    @property
    def planned(self) -> int:
        """Samples of all domains that the model went through."""
        return self.rows[-1].planned if self.rows else 0


def read_ledger(run: Path) -> LedgerFacts:
    """Return the ledger of a run directory; a missing or damaged one is told in `absent`."""
    file = run / "ledger" / "summary.json"
    if not file.is_file():
        return LedgerFacts(absent="The run has no ledger/summary.json: it has not ended, or it ran without a ledger.")
    try:
        content = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        domains = cast(dict[str, Any], content["domains"])
        rows = [_row(name, entry) for name, entry in domains.items()]
        return LedgerFacts((*rows, _row("all domains", content)), _reasons(run / "ledger"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return LedgerFacts(absent=f"{file} could not be read ({type(error).__name__}: {error}).")


def _row(name: str, entry: Mapping[str, Any]) -> LedgerRow:
    return LedgerRow(name, int(entry["planned"]), int(entry["seen"]), int(entry["quarantined"]))


def _reasons(folder: Path) -> tuple[tuple[str, int], ...]:
    """Count the reasons of planned samples that were bad; a step that was done again counts once."""
    reasons: dict[Any, str] = {}
    for file in sorted(folder.glob("rank-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = cast(dict[str, Any], json.loads(line))
            except ValueError:
                continue  # a line that was being written when the process died
            if not entry.get("attempt"):
                reasons[entry.get("index")] = str(entry.get("reason", ""))
    return tuple(Counter(reasons.values()).most_common(TOP_REASONS))


def cost_facts(
    metrics: Mapping[str, Series], ledger: LedgerFacts, price_per_hour: float | None
) -> list[tuple[str, str]]:
    """Return (name, value) of throughput, hours and cost, as far as the run tells them.

    Hours are images over the median throughput: what training itself took, without start and validation.

    Args:
        metrics: the run's log.
        ledger: how many images it went through.
        price_per_hour: of all its machines together, in any currency; None leaves the cost out.
    """
    facts: list[tuple[str, str]] = []
    if ledger.planned:
        facts.append(("images trained on", count_text(ledger.planned)))
    rate = metrics.get(RATE)
    if rate is None or not rate.values or median(rate.values) <= 0:
        return facts
    typical = median(rate.values)
    facts.append(("median throughput", f"{typical:,.1f} images/s over all devices"))
    if not ledger.planned:
        return facts
    hours = ledger.planned / typical / SECONDS_PER_HOUR
    facts.append(("training time at that rate", f"{duration_text(hours)}, without start and validation"))
    if price_per_hour is None:
        facts.append(("cost", "not computed: give --price_per_hour, the price of the run's machines together"))
    else:
        facts.append(("cost", f"{hours * price_per_hour:,.2f} at {price_per_hour:,.2f} an hour"))
    return facts


def duration_text(hours: float) -> str:
    """Return a duration in hours, or minutes and seconds where it is short."""
    seconds = round(hours * SECONDS_PER_HOUR)
    if seconds < SECONDS_PER_HOUR:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{hours:,.1f} h"
