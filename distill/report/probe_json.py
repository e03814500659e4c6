"""The scores of `probe.json`, checked and typed, so that the page never meets a surprise halfway down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distill.errors import DataError

FORMAT = "distill-probe/1"
OVERALL = "overall"


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval, where it has one, and the number of images behind it."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class EncoderScores:
    """One encoder's figures.

    Attributes:
        name: unique in the probe.
        role: "initial", "student", "teacher" or "other".
        embed_dim: width of its features.
        num_params: how many parameters it has.
        scores: by metric ("linear_top1", "knn_top1", "cosine_centred", "cka") and scope ("overall" or a domain).
    """

    name: str
    role: str
    embed_dim: int | None
    num_params: int | None
    scores: dict[str, dict[str, Score]]


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


@dataclass(frozen=True)
class ProbeResults:
    """Everything the page says from `probe.json`.

    Attributes:
        data: the block `data`, as it is.
        settings: plain values beside it: seed, pool, image size and whatever else the probe recorded.
        encoders: in the probe's order.
        paired: in the probe's order.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    encoders: tuple[EncoderScores, ...]
    paired: tuple[Paired, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """The probed domains."""
        return tuple(str(name) for name in cast(Sequence[Any], self.data.get("domains") or ()))

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
        """The difference `a - b`, whichever way round the probe wrote it."""
        for entry in self.paired:
            if (entry.metric, entry.scope) != (metric, scope):
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


def read_probe(file: Path) -> ProbeResults:
    """Return the scores in a `probe.json`.

    Raises:
        DataError: the file is no JSON, of another format, or lacks what the format promises.
    """
    try:
        loaded: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}. Run `distill probe` again.") from error
    found: Any = cast(dict[str, Any], loaded).get("format") if isinstance(loaded, dict) else None
    if found != FORMAT:
        raise DataError(f"{file} has the format {found!r}; this version reads {FORMAT!r}. Run `distill probe` again.")
    try:
        return _results(cast(dict[str, Any], loaded))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} does not hold what {FORMAT} promises ({type(error).__name__}: {error}). Run `distill probe` again."
        ) from error


def _results(loaded: dict[str, Any]) -> ProbeResults:
    settings = {
        key: value for key, value in loaded.items() if key != "format" and isinstance(value, str | int | float | None)
    }
    encoders = tuple(_encoder(entry) for entry in loaded["encoders"])
    paired = tuple(_paired(entry) for entry in loaded.get("paired") or ())
    return ProbeResults(dict(loaded["data"]), settings, encoders, paired)


def _encoder(entry: Mapping[str, Any]) -> EncoderScores:
    fidelity: Mapping[str, Any] | None = entry.get("fidelity")
    scores = {
        "linear_top1": _scores(entry.get("linear"), None, "top1"),
        "knn_top1": _scores(entry.get("knn"), None, "top1"),
        "cosine_centred": _scores(fidelity, "cosine_centred", "mean"),
        "cka": _scores(fidelity, "cka", "value"),
    }
    return EncoderScores(
        str(entry["name"]),
        str(entry["role"]),
        _integer(entry.get("embed_dim")),
        _integer(entry.get("num_params")),
        scores,
    )


def _scores(block: Mapping[str, Any] | None, inner: str | None, value: str) -> dict[str, Score]:
    if not block:
        return {}
    scopes: dict[str, Any] = {OVERALL: block.get(OVERALL), **(block.get("domains") or {})}
    found: dict[str, Score] = {}
    for scope, content in scopes.items():
        figures: Mapping[str, Any] | None = content if inner is None or content is None else content.get(inner)
        if figures and figures.get(value) is not None:
            found[scope] = Score(
                float(figures[value]),
                _float(figures.get("low")),
                _float(figures.get("high")),
                _integer(figures.get("n")),
            )
    return found


def _paired(entry: Mapping[str, Any]) -> Paired:
    return Paired(
        str(entry["metric"]),
        str(entry["scope"]),
        str(entry["a"]),
        str(entry["b"]),
        float(entry["difference"]),
        _float(entry.get("low")),
        _float(entry.get("high")),
        _integer(entry.get("n")),
        str(entry["verdict"]),
    )


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)
