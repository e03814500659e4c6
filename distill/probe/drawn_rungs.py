"""The rungs that run the encoder again: on images that are drawn for them, or on changed ones of the probe set."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor, nn

from distill.probe.chart import chart_scores
from distill.probe.cohort import Cohort
from distill.probe.extraction import Extraction
from distill.probe.ladder import Rung
from distill.probe.linear import LinearResult
from distill.probe.ocr import ocr_scores
from distill.probe.probe_set import ProbeSet
from distill.probe.robustness import robustness_scores
from distill.probe.rung import RungScore
from distill.probe.segmentation import segmentation_scores
from distill.probe.text_lines import TextPages

FURTHER: tuple[Rung, ...] = ("segmentation", "ocr", "chart", "robustness")
"""The rungs of this kind, in their order."""


def further_scores(
    rung: Rung,
    encoder: nn.Module,
    how: Extraction,
    console: Console,
    *,
    cohort: Cohort,
    data: ProbeSet,
    pooled: Tensor,
    pages: TextPages | None = None,
    linear: LinearResult | None = None,
) -> list[RungScore]:
    """Climb one of `FURTHER`.

    Args:
        rung: which.
        encoder: with its weights.
        how: features are taken.
        console: for progress.
        cohort: the images of the probe set, with their split.
        data: the probe set.
        pooled: `[N, D]`, the encoder's features of the cohort's images.
        pages: text lines to read beside the drawn ones.
        linear: the linear probe of `pooled`; trained again when left out.

    Raises:
        ConfigError: the encoder refuses images of a size that the rung needs.
        DataError: a feature is not finite, or an image cannot be read.
        ValueError: the rung is none of `FURTHER`.
    """
    if rung == "segmentation":
        return segmentation_scores(encoder, how, how.seed, console)
    if rung == "ocr":
        given = [] if pages is None else ocr_scores(encoder, how, how.seed, console, pages)
        return ocr_scores(encoder, how, how.seed, console) + given
    if rung == "chart":
        return chart_scores(encoder, how, how.seed, console)
    if rung == "robustness":
        return robustness_scores(encoder, how, how.seed, console, cohort, data, pooled, linear=linear)
    raise ValueError(f"{rung} is none of {', '.join(FURTHER)}")
