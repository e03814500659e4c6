"""From features to figures: one encoder's rungs, and the paired differences of encoders.

One classifier is trained on all labelled images together; a domain's accuracy is that classifier's on the domain's
test images, against all classes. Images without a label, or of a class that was dropped, count for fidelity only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.probe.cohort import OVERALL, Cohort
from distill.probe.feature_records import LAST, Features, Grid
from distill.probe.fidelity_scores import fidelity_block, fidelity_scores
from distill.probe.ladder import Rung, classification_scores
from distill.probe.linear import LinearResult
from distill.probe.rung import LOWER_IS_BETTER, RungScore
from distill.probe.score_intervals import paired_entries, score_entries
from distill.probe.unpaired import UNPAIRED, cka_entries, effective_rank_entries

__all__ = ["OVERALL", "Cohort", "Reference", "Scores", "compare", "metrics_of", "score_encoder"]


@dataclass(frozen=True)
class Reference:
    """The teacher that an encoder is compared with, and the grid that their tokens are compared on."""

    name: str
    features: Features
    grid: Grid


@dataclass(frozen=True)
class Scores:
    """An encoder's figures as probe.json holds them, and the rungs behind them.

    Attributes:
        entry: the keys "linear", "knn", "fidelity" and "scores".
        rungs: every figure with its parts by image.
        linear: the last layer's linear probe, if a rung asked for it.
    """

    entry: dict[str, Any]
    rungs: list[RungScore]
    linear: LinearResult | None = None

    def with_rungs(self, further: Sequence[RungScore], seed: int) -> Scores:
        """Return these scores and further ones."""
        entries = [entry for score in further for entry in score_entries(score, seed=seed)]
        return Scores({**self.entry, "scores": [*self.entry["scores"], *entries]}, [*self.rungs, *further], self.linear)


def score_encoder(
    features: Features, cohort: Cohort, reference: Reference | None, rungs: Sequence[Rung], layers: Sequence[int]
) -> Scores:
    """Score one encoder by the rungs that need its features of the cohort's images alone.

    Args:
        features: of all images of the cohort, in its order.
        cohort: the images.
        reference: what it is compared with; None for the teacher itself and where there is no teacher.
        rungs: which to climb.
        layers: which hidden states to judge; see `classification_scores` and `fidelity_scores`.
    """
    entry: dict[str, Any] = {"linear": None, "knn": None, "fidelity": None, "scores": []}
    found: list[RungScore] = []
    linear: LinearResult | None = None
    if cohort.class_names:
        found, chosen, linear = classification_scores(features, cohort, rungs, layers)
        entries = [item for score in found for item in score_entries(score, seed=cohort.seed)]
        entry["scores"] = entries
        for block, metric in (("linear", "linear_top1"), ("knn", "knn_top1")):
            entry[block] = _accuracy_block(metric, chosen, entries)
    if reference is not None and "fidelity" in rungs:
        compared, by_layer = fidelity_scores(features, reference.features, cohort, reference.grid, layers)
        entries = [item for score in compared for item in score_entries(score, seed=cohort.seed)]
        entries += cka_entries(features, reference.features, cohort, layers)
        tokens_per_image = features.tokens[reference.grid].shape[1]
        entry["fidelity"] = fidelity_block(reference.name, by_layer[LAST], entries, reference.grid, tokens_per_image)
        entry["scores"] = [*entry["scores"], *entries]
        found = [*found, *compared]
    if "effective_rank" in rungs:
        entry["scores"] = [*entry["scores"], *effective_rank_entries(features, cohort, layers)]
    return Scores(entry, found, linear)


def _accuracy_block(
    metric: str, chosen: Mapping[str, dict[str, Any]], entries: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the key "linear" or "knn" of an encoder, as the first format has it."""
    scopes = {
        entry["scope"]: {"top1": entry["value"], "low": entry["low"], "high": entry["high"], "n": entry["n"]}
        for entry in entries
        if entry["metric"] == metric and entry["at"] is None
    }
    if not scopes:
        return None
    return {**chosen[metric], OVERALL: scopes.pop(OVERALL), "domains": scopes}


def compare(scores: Mapping[str, Scores], pairs: Sequence[tuple[str, str]], seed: int) -> list[dict[str, Any]]:
    """Return the paired differences `a - b` of every figure that both encoders have on the same images.

    Args:
        scores: by encoder name.
        pairs: names (a, b).
        seed: of the resampling.
    """
    found: list[dict[str, Any]] = []
    for a, b in pairs:
        others = {(score.metric, score.at): score for score in scores[b].rungs}
        for score in scores[a].rungs:
            other = others.get((score.metric, score.at))
            if other is not None:
                found += paired_entries(score, other, (a, b), seed=seed)
    return found


def metrics_of(scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Return the key "metrics" of probe.json: how each metric is named, written and judged."""
    found: dict[str, dict[str, Any]] = {}
    for encoder in scores.values():
        for score in encoder.rungs:
            better = score.kind in LOWER_IS_BETTER
            about = {"title": score.title, "kind": score.kind, "lower_is_better": better, "blind": score.blind}
            if (known := found.setdefault(score.metric, about))["blind"] is None:
                known["blind"] = score.blind
        metrics = {entry["metric"] for entry in encoder.entry["scores"]}
        for metric, (title, kind) in UNPAIRED.items():
            if metric in metrics:
                found.setdefault(metric, {"title": title, "kind": kind, "lower_is_better": False, "blind": None})
    return found
