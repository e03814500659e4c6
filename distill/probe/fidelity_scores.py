"""Fidelity as scores: how much of the teacher an encoder holds, per domain and layer, and the ceiling of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from distill.probe.cohort import OVERALL, Cohort
from distill.probe.feature_records import LAST, Features, Grid
from distill.probe.fidelity import CosineResult, cosine_centred, cosine_to_itself
from distill.probe.protocol import IntArray
from distill.probe.retrieval import NEIGHBOURS, retrieval_agreement
from distill.probe.rung import Kind, RungScore
from distill.probe.score_intervals import parts_of

TITLES: dict[str, tuple[str, Kind]] = {
    "cosine_centred": ("Fidelity of patch tokens to the teacher, centred cosine (mean teacher token = 0)", "cosine"),
    "cosine_raw": ("Fidelity of patch tokens to the teacher, raw cosine (the mean token left in)", "cosine"),
    "relative_l2": ("Distance of patch tokens to the teacher's, relative L2 after the ridge map", "distance"),
    "retrieval_agreement": (f"Retrieval agreement, share of the teacher's {NEIGHBOURS} nearest neighbours", "accuracy"),
}


def fidelity_scores(
    features: Features, teacher: Features, cohort: Cohort, grid: Grid, layers: Sequence[int]
) -> tuple[list[RungScore], dict[int, CosineResult]]:
    """Compare an encoder with the teacher on the test split.

    Args:
        features: of the encoder that is judged.
        teacher: of the teacher, on the same images.
        cohort: the images.
        grid: the grid that tokens are compared on.
        layers: which hidden states to compare, each with the teacher's at the same place from the end. With more than
            one, each gives a point of a curve beside the last one's single figures.

    Returns:
        The scores, and what the token comparison found by layer.
    """
    scores: list[RungScore] = []
    found: dict[int, CosineResult] = {}
    for layer in layers:
        mine, theirs = features.tokens_by_layer[layer][grid], teacher.tokens_by_layer[layer][grid]
        found[layer] = cosine_centred(mine, theirs, cohort.domains, cohort.split)
        at_test = torch.from_numpy(cohort.split.test)
        agreement = retrieval_agreement(features.by_layer[layer][at_test], teacher.by_layer[layer][at_test])
        settings = {"ridge_strength": found[layer].strength, "grid": list(grid), "tokens_per_image": mine.shape[1]}
        of_layer = _token_scores(found[layer], cohort, grid, settings)
        of_layer.append(_score("retrieval_agreement", agreement, cohort, cohort.data, {"k": NEIGHBOURS}))
        scores += of_layer if layer == LAST else []
        if len(layers) > 1:
            scores += [replace(score, at=("layer", float(layer))) for score in of_layer]
    return scores, found


def ceiling_scores(augmented: Features, teacher: Features, cohort: Cohort, grid: Grid) -> list[RungScore]:
    """Compare the teacher's features of augmented test images with those of the images as they are.

    Args:
        augmented: of the test images alone, in the order of the test split.
        teacher: of all images.
        cohort: the images.
        grid: the grid that tokens are compared on.
    """
    tokens = teacher.tokens[grid]
    result = cosine_to_itself(augmented.tokens[grid], tokens, cohort.domains, cohort.split)
    settings = {"grid": list(grid), "tokens_per_image": tokens.shape[1]}
    agreement = retrieval_agreement(augmented.pooled, teacher.pooled[torch.from_numpy(cohort.split.test)])
    return [
        *_token_scores(result, cohort, grid, settings),
        _score("retrieval_agreement", agreement, cohort, cohort.data, {"k": NEIGHBOURS}),
    ]


def _token_scores(result: CosineResult, cohort: Cohort, grid: Grid, settings: dict[str, Any]) -> list[RungScore]:
    # Tokens on another grid are other tokens: figures of two encoders are paired on one grid only.
    data = f"{cohort.data} tokens on {grid[0]}x{grid[1]}"
    values = {"cosine_centred": result.per_image, "cosine_raw": result.raw, "relative_l2": result.relative_l2}
    return [_score(metric, value, cohort, data, settings) for metric, value in values.items()]


def _score(metric: str, values: Any, cohort: Cohort, data: str, settings: dict[str, Any]) -> RungScore:
    title, kind = TITLES[metric]
    test: IntArray = cohort.split.test
    parts = parts_of(np.asarray(values), cohort.rows[test], cohort.groups[test], cohort.domains[test])
    return RungScore(metric, title, kind, parts, settings, domain_names=cohort.domain_names, data=data)


def fidelity_block(
    name: str, result: CosineResult, scores: Sequence[dict[str, Any]], grid: Grid, tokens_per_image: int
) -> dict[str, Any]:
    """Return the key "fidelity" of an encoder, as the first format has it.

    Args:
        name: of the teacher.
        result: of the last layer's tokens.
        scores: the encoder's entries of "scores".
        grid: the grid of the tokens.
        tokens_per_image: how many were compared.
    """
    scopes: dict[str, Any] = {}
    for entry in scores:
        if entry["at"] is None and entry["metric"] == "cosine_centred":
            figures = {"mean": entry["value"], "low": entry["low"], "high": entry["high"], "n": entry["n"]}
            none = {"value": None, "low": None, "high": None, "n": entry["n"]}
            scopes[entry["scope"]] = {"cosine_centred": figures, "cka": none}
    for entry in scores:
        if entry["at"] is None and entry["metric"] == "cka" and entry["scope"] in scopes:
            scopes[entry["scope"]]["cka"] = {key: entry[key] for key in ("value", "low", "high", "n")}
    return {
        "teacher": name,
        "grid": list(grid),
        "tokens_per_image": tokens_per_image,
        "ridge_strength": result.strength,
        "cka_estimator": "debiased",
        OVERALL: scopes.pop(OVERALL),
        "domains": scopes,
    }
