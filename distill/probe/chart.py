"""Chart probe: a chart's type by linear probe on pooled tokens, and its values by ridge regression on a grid of tokens.

Values are read by one regression a family of chart types (`drawn_charts.FAMILIES`), from patch tokens that are averaged
onto a grid of at most 7 x 7 cells, so that a place in the chart is a place among the features. The regression has as
many features as a grid has numbers, far more than charts, and is solved in closed form in the span of the charts.

Legend: N charts, F features, V values a chart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from distill.probe.blind import commonest_class_accuracy
from distill.probe.drawn import drawn_split, fingerprint, map_batches, unit_scale
from distill.probe.drawn_charts import FAMILIES, NUM_VALUES, TYPES, Charts, ChartSettings, draw_charts
from distill.probe.extraction import Extraction
from distill.probe.intervals import FloatArray
from distill.probe.linear import linear_probe
from distill.probe.protocol import IntArray, Split
from distill.probe.rung import PerImage, RungScore

TYPE_METRIC, R2_METRIC, ERROR_METRIC = "chart_type_top1", "chart_value_r2", "chart_value_error"
GRID = 7
STRENGTHS = tuple(float(strength) for strength in np.logspace(-6, 4, 21))
"""Ridge strengths, as multiples of the mean of the centred Gram matrix's diagonal."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """What a ridge regression found.

    Attributes:
        predictions: `[n_test, V]`, float64.
        strength: the chosen one of `STRENGTHS`.
    """

    predictions: FloatArray
    strength: float


def chart_scores(
    encoder: nn.Module, how: Extraction, seed: int, console: Console, drawing: ChartSettings | None = None
) -> list[RungScore]:
    """Return top-1 of the chart's type, and R2 and mean absolute error of its values, with families as domains.

    Args:
        encoder: offers `distill.encoder.Encoder`.
        how: features are taken.
        seed: of the drawn charts.
        console: for progress.
        drawing: what is drawn; the defaults at `how.img_size_px` when left out.

    Raises:
        ConfigError: the encoder refuses images of that size.
        DataError: a feature is not finite.
    """
    drawing = drawing or ChartSettings(img_size_px=how.img_size_px, seed=seed)
    charts = draw_charts(drawing)
    # Blocks of one chart of each type are split as a whole: each part has every type equally often.
    split = drawn_split(-(-drawing.num_charts // len(TYPES)), np.arange(drawing.num_charts) // len(TYPES))
    pooled, grids = _features(encoder, how, charts, console)
    data = fingerprint("charts", drawing)
    return [_type_score(pooled, charts, split, data), *_value_scores(grids, charts, split, data)]


def _features(encoder: nn.Module, how: Extraction, charts: Charts, console: Console) -> tuple[Tensor, Tensor]:
    """Return mean tokens `[N, D]` and grids of tokens `[N, F]`."""
    pooled: list[Tensor] = []
    grids: list[Tensor] = []
    for _, maps in map_batches(encoder, how, charts.images, console, "Charts"):
        planes = maps.permute(0, 3, 1, 2)
        pooled.append(planes.mean((2, 3)))
        side = min(GRID, planes.shape[2]), min(GRID, planes.shape[3])
        grids.append(F.adaptive_avg_pool2d(planes, side).flatten(1))
    return torch.cat(pooled), torch.cat(grids)


def _type_score(pooled: Tensor, charts: Charts, split: Split, data: str) -> RungScore:
    found = linear_probe(pooled, charts.types, split, num_classes=len(TYPES))
    families = _family_of_type()[charts.types.numpy()[split.test]]
    correct = (found.predictions == charts.types[torch.from_numpy(split.test)]).double().numpy()[:, None]
    parts = PerImage(split.test, correct, np.ones_like(correct), split.test, families)
    settings = {"C": found.c, "charts": len(charts.types), "types": list(TYPES)}
    title = "Chart type, linear probe, top-1"
    blind = commonest_class_accuracy(charts.types.numpy(), split.fit, split.test)
    return RungScore(
        TYPE_METRIC, title, "accuracy", parts, settings, domain_names=tuple(FAMILIES), data=data, blind=blind
    )


def _family_of_type() -> IntArray:
    names = [name for name, kinds in FAMILIES.items() for _ in kinds]
    return np.asarray([list(FAMILIES).index(name) for name in names], dtype=np.int64)


def _value_scores(grids: Tensor, charts: Charts, split: Split, data: str) -> list[RungScore]:
    families = _family_of_type()[charts.types.numpy()]
    test = split.test
    squares = np.zeros((len(families), len(FAMILIES) * NUM_VALUES))
    spreads, errors, guesses = squares.copy(), np.zeros((len(families), 1)), np.zeros((len(families), 1))
    strengths: dict[str, float] = {}
    for number, name in enumerate(FAMILIES):
        part = split.restrict(families == number)
        found = ridge_probe(grids, charts.values, part)
        strengths[name] = found.strength
        true = charts.values[part.test]
        columns = np.arange(number * NUM_VALUES, (number + 1) * NUM_VALUES)
        squares[part.test[:, None], columns] = (found.predictions - true) ** 2
        spreads[part.test[:, None], columns] = (true - true.mean(0)) ** 2
        errors[part.test, 0] = np.abs(found.predictions - true).mean(1)
        guesses[part.test, 0] = np.abs(charts.values[part.fit].mean(0) - true).mean(1)
    settings: dict[str, Any] = {"ridge_strength": strengths, "charts": len(families), "features": grids.shape[1]}
    names, domains = tuple(FAMILIES), families[test]
    r2 = PerImage(test, squares[test], spreads[test], test, domains)
    error = PerImage(test, errors[test], np.ones((len(test), 1)), test, domains)
    title = "Chart values, mean absolute error"
    return [
        RungScore(R2_METRIC, "Chart values, R2", "r2", r2, settings, domain_names=names, data=data, blind=0.0),
        RungScore(
            ERROR_METRIC,
            title,
            "distance",
            error,
            settings,
            domain_names=names,
            data=data,
            blind=float(guesses[test].mean()),
        ),
    ]


def ridge_probe(features: Tensor, values: FloatArray, split: Split) -> Ridge:
    """Choose the ridge strength on the select part, refit on fit and select, and predict the test part once.

    Features are standardised by the fit part, values centred; computed in float64 from the charts' Gram matrix, which
    is exact whatever the number of features.

    Args:
        features: `[N, F]`, float32.
        values: `[N, V]`.
        split: positions of fit, select and test.
    """
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    mean, std = unit_scale(features[fit])
    order = torch.cat([fit, select, test])
    x = ((features[order] - mean) / std).double()
    gram = (x @ x.T) / x.shape[1]
    targets = torch.from_numpy(values)[order]
    num_fit, num_seen = len(fit), len(fit) + len(select)
    errors = {
        strength: float(
            (_predict(gram, targets, num_fit, num_seen, strength) - targets[num_fit:num_seen]).square().sum()
        )
        for strength in STRENGTHS
    }
    best = min(errors, key=errors.__getitem__)
    return Ridge(_predict(gram, targets, num_seen, len(order), best).numpy(), best)


def _predict(gram: Tensor, targets: Tensor, num_seen: int, end: int, strength: float) -> Tensor:
    """Return the values of images `num_seen` to `end`, learnt from the first `num_seen`, with an intercept."""
    seen = gram[:num_seen, :num_seen]
    # Centring by the images that are learnt from stands for the intercept, which is not penalised.
    across = seen.mean(0)
    centred = seen - across[None] - across[:, None] + across.mean()
    mean = targets[:num_seen].mean(0)
    scale = centred.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    ridge = centred + strength * scale * torch.eye(num_seen, dtype=gram.dtype)
    weights = torch.linalg.solve(ridge, targets[:num_seen] - mean)
    new = gram[num_seen:end, :num_seen]
    new = new - across[None] - new.mean(1, keepdim=True) + across.mean()
    return new @ weights + mean
