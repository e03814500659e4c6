"""The content of a `probe.json` as types: encoders, their figures and curves, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

OVERALL = "overall"
At = tuple[str, float]


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is named, written and judged; `kind` and `blind` as in `distill.probe.rung`."""

    title: str
    kind: str
    lower_is_better: bool = False
    blind: float | None = None


KNOWN_METRICS = {
    "linear_top1": MetricInfo("Linear probe, top-1", "accuracy"),
    "knn_top1": MetricInfo("kNN, top-1", "accuracy"),
    "cosine_centred": MetricInfo("Fidelity, centred cosine", "cosine"),
    "cka": MetricInfo("CKA of pooled features", "cosine"),
}
"""The metrics of "distill-probe/1", which names none itself."""


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval, where it has one, the number of images behind it, and the seed."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class EncoderScores:
    """One encoder's figures.

    Attributes:
        name: unique in the probe.
        role: "initial", "student", "teacher", "other", or "ceiling".
        embed_dim: width of its features.
        num_params: how many parameters it has.
        scores: by metric and scope ("overall" or a domain).
        curves: by metric and axis, then by scope: (x, figure), x ascending.
    """

    name: str
    role: str
    embed_dim: int | None
    num_params: int | None
    scores: dict[str, dict[str, Score]]
    curves: dict[tuple[str, str], dict[str, list[tuple[float, Score]]]] = field(
        default_factory=dict[tuple[str, str], dict[str, list[tuple[float, Score]]]]
    )

    def of(self, metric: str) -> dict[str, Score]:
        """The figures of one metric by scope; empty where it was not measured."""
        return self.scores.get(metric, {})


@dataclass(frozen=True)
class Paired:
    """The difference `a - b` of two encoders on the same images."""

    metric: str
    scope: str
    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    n: int | None
    verdict: str
    at: At | None = None


@dataclass(frozen=True)
class TensorEntry:
    """Where the per-image parts of one figure lie in the file of per-image values.

    Attributes:
        encoder: name of the encoder.
        metric: name of the metric.
        at: point of a curve, or None.
        prefix: of its tensors' names.
        data: fingerprint of the images.
        domain_names: what its domain numbers stand for; empty where images have no domain.
    """

    encoder: str
    metric: str
    at: At | None
    prefix: str
    data: str
    domain_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeResults:
    """Everything that is read from a `probe.json`.

    Attributes:
        data: the block `data`, as it is.
        settings: plain values beside it: seed, pool, image size and whatever else the probe recorded.
        encoders: in the probe's order.
        paired: in the probe's order.
        metrics: by name, in the probe's order.
        per_image: the file of per-image values; None in format 1, which has none.
        tensors: what that file holds.
        leaks: how many probed images were found in training shards, as the probe wrote it; None when not looked for.
        ceiling: fidelity of the teacher to itself under augmentation, in the role "ceiling"; None without.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    encoders: tuple[EncoderScores, ...]
    paired: tuple[Paired, ...]
    metrics: dict[str, MetricInfo] = field(default_factory=lambda: dict(KNOWN_METRICS))
    per_image: Path | None = None
    tensors: tuple[TensorEntry, ...] = ()
    leaks: dict[str, Any] | None = None
    ceiling: EncoderScores | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """The probed domains."""
        return tuple(str(name) for name in cast(list[Any], self.data.get("domains") or []))

    def info(self, metric: str) -> MetricInfo:
        """How a metric is named and written; one that nothing describes is shown under its own name."""
        return self.metrics.get(metric) or KNOWN_METRICS.get(metric) or MetricInfo(metric, "cosine")

    def of_role(self, role: str) -> list[EncoderScores]:
        """The encoders of one role."""
        return [encoder for encoder in self.encoders if encoder.role == role]

    def initial_of(self, student: str) -> EncoderScores | None:
        """The initialisation that a student was compared with, or None when it was compared with none."""
        initial = {encoder.name: encoder for encoder in self.of_role("initial")}
        for entry in self.paired:
            other = entry.b if entry.a == student else entry.a if entry.b == student else None
            if other in initial:
                return initial[other]
        return None

    def comparison(self, a: str, b: str, metric: str, scope: str) -> Paired | None:
        """The difference `a - b` of a figure that is no point of a curve, whichever way round the probe wrote it."""
        for entry in self.paired:
            if (entry.metric, entry.scope, entry.at) != (metric, scope, None):
                continue
            if (entry.a, entry.b) == (a, b):
                return entry
            if (entry.a, entry.b) == (b, a):
                return _reversed(entry)
        return None


def _reversed(entry: Paired) -> Paired:
    opposite = {"better": "worse", "worse": "better"}.get(entry.verdict, entry.verdict)
    low = None if entry.high is None else -entry.high
    high = None if entry.low is None else -entry.low
    return Paired(entry.metric, entry.scope, entry.b, entry.a, -entry.difference, low, high, entry.n, opposite)
