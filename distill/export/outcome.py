"""What became of each target: the lines and the table that `distill export` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from distill.export.verify import VariantProof, Verification


@dataclass(frozen=True)
class Exported:
    """One published export: where, how large, and what its verification proved."""

    target: str
    directory: Path
    size_bytes: int
    verification: Verification


@dataclass(frozen=True)
class NotExported:
    """One target that was not published, and why.

    Attributes:
        target: the format.
        reason: one line.
        is_failure: it should have been possible: writing or verifying it failed.
    """

    target: str
    reason: str
    is_failure: bool = False


def outcome_table(exported: Sequence[Exported]) -> Table:
    """Return a row for each file: size, worst difference, lowest cosine, latency at batch 1, consumer."""
    table = Table("target", "precision", "size", "worst difference", "cosine", "latency, batch 1", "verified by")
    for item in exported:
        for position, proof in enumerate(item.verification.variants):
            table.add_row("" if position else item.target, *_cells(proof), "" if position else _consumer(item))
    return table


def _cells(proof: VariantProof) -> tuple[str, ...]:
    latency = "not timed" if proof.latency_ms is None else f"{proof.latency_ms:.1f} ms"
    size = f"{proof.size_bytes / 1e6:.1f} MB"
    return proof.name, size, f"{proof.worst_difference:.1e}", f"{proof.min_cosine:.6f}", latency


def _consumer(item: Exported) -> str:
    return f"{item.verification.consumer}, {item.verification.seconds:.0f} s"


def reason_lines(others: Sequence[NotExported]) -> list[str]:
    """Return a line for each target that is missing from the table."""
    return [f"{'FAILED' if item.is_failure else 'left out'}: {item.target}: {item.reason}" for item in others]
