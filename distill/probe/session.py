"""One probing session: features of every encoder in turn, the teacher's first, and the rungs climbed with them."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from rich.console import Console
from torch.utils.data import Subset

from distill.data.randomness import AUGMENT_STREAM, generator_for
from distill.data.transforms import Augmentation, augment, square_view
from distill.encoder import Encoder
from distill.errors import DataError
from distill.probe.cached_features import extract_cached
from distill.probe.cohort import Cohort, choose_cohort, rows_of
from distill.probe.drawn_rungs import FURTHER, further_scores
from distill.probe.encoders import NamedEncoder
from distill.probe.extraction import Extraction
from distill.probe.feature_cache import FeatureCache
from distill.probe.feature_records import Features, Grid, Wanted
from distill.probe.features import Samples, extract_features, grid_of
from distill.probe.fidelity_scores import ceiling_scores
from distill.probe.ladder import Rung, choose_rungs
from distill.probe.probe_set import ProbeSet
from distill.probe.ranks import alone, is_first
from distill.probe.score_intervals import score_entries
from distill.probe.scores import Reference, Scores, score_encoder
from distill.probe.text_lines import TextPages

TOKEN_BYTES = 1 << 30
"""Memory for one encoder's tokens of either kind; fewer tokens an image are kept when it does not suffice."""

TOKENS_PER_IMAGE = 16
MAX_DENSE_SIDE = 8
"""The attentive probe sees patch maps averaged down to at most so many cells a side: at 14 x 14 cells of 320 channels
it took 26 s of a small CPU for one encoder and 600 images, more than all other classifiers together."""


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        layers: hidden states, counted from the end, ascending.
        rungs: which to climb; None means all that the data allows.
        cache: where features are kept.
        pages: text lines for the rung "ocr" to read beside the drawn ones.
    """

    layers: tuple[int, ...]
    rungs: Sequence[Rung] | None
    cache: FeatureCache | None
    pages: TextPages | None = None


@dataclass
class Judged:
    """What a session found.

    Attributes:
        cohort: the images.
        rungs: that were climbed.
        layers: that were judged.
        scores: by encoder, in the order the encoders were given.
        ceiling: the key "fidelity_ceiling" of probe.json.
        seconds: what each encoder's features and rungs took.
    """

    cohort: Cohort
    rungs: tuple[Rung, ...]
    layers: tuple[int, ...]
    scores: dict[str, Scores]
    ceiling: dict[str, Any] | None = None
    seconds: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


def judge(
    encoders: Sequence[NamedEncoder], data: ProbeSet, rows: list[int], how: Extraction, plan: Plan, console: Console
) -> Judged | None:
    """Extract and score every encoder, the teacher first, because the others are compared with its tokens.

    Args:
        encoders: with their weights.
        data: the images.
        rows: which of them.
        how: features are taken.
        plan: what is asked for.
        console: for progress.

    Returns:
        What was found; None in every process but the first.

    Raises:
        ConfigError: a rung or layer cannot be had.
        DataError: images cannot be read or split, or there is nothing to measure.
    """
    session = _Session(encoders, data, rows, how, plan, console)
    for entry in sorted(encoders, key=lambda entry: entry is not session.teacher):
        session.extract(entry)
        if is_first():
            with alone():
                session.score(entry)
        entry.module.to("cpu")  # a GPU need hold one encoder at a time
    return session.result([entry.name for entry in encoders]) if is_first() else None


class _Session:
    def __init__(
        self,
        encoders: Sequence[NamedEncoder],
        data: ProbeSet,
        rows: list[int],
        how: Extraction,
        plan: Plan,
        console: Console,
    ) -> None:
        self.data, self.how, self.plan, self.console, self.rows = data, how, plan, console, rows
        self.teacher = next((entry for entry in encoders if entry.role == "teacher"), None)
        has_labels = bool((data.labels[rows] >= 0).any())
        if not has_labels and self.teacher is None and plan.rungs is None:
            raise DataError("No image has a label and there is no teacher: nothing can be measured. Add labels.")
        self.rungs = choose_rungs(plan.rungs, has_labels=has_labels, has_teacher=self.teacher is not None)
        self.samples = cast(Samples, Subset(cast(Any, data), rows))
        self.grids = {} if self.teacher is None else _common_grids(encoders, self.teacher, how)
        widest = max(cast(Encoder, entry.module).embed_dim for entry in encoders)
        per_image = TOKEN_BYTES // (4 * widest * max(1, len(rows)))
        self.tokens_per_image = max(1, min(TOKENS_PER_IMAGE, per_image // len(plan.layers)))
        self.dense_side = max(1, min(MAX_DENSE_SIDE, int(per_image**0.5)))
        self.seconds: dict[str, dict[str, float]] = {}
        self.scores: dict[str, Scores] = {}
        self.cohort: Cohort | None = None
        self.reference: Features | None = None
        self.features: Features | None = None
        self.ceiling: dict[str, Any] | None = None

    def extract(self, entry: NamedEncoder) -> None:
        """Take an encoder's features, in all processes."""
        with self._timed(entry.name, "features"):
            wanted = self._wanted(entry)
            if self.plan.cache is None:
                self.features = extract_features(
                    entry.module, self.samples, self.how, wanted, name=entry.name, console=self.console
                )
            else:
                self.features = extract_cached(
                    entry.module,
                    self.samples,
                    self.how,
                    wanted,
                    cache=self.plan.cache,
                    data=(self.data.fingerprint, self.rows),
                    name=entry.name,
                    console=self.console,
                )

    def _wanted(self, entry: NamedEncoder) -> Wanted:
        grids: Sequence[Grid] = ()
        if "fidelity" in self.rungs:
            every = sorted(set(self.grids.values()))
            grids = every if entry is self.teacher else [self.grids[entry.name]] if entry.name in self.grids else []
        dense = None
        if "attentive" in self.rungs:
            height, width = grid_of(entry.module, self.how.img_size_px, device=self.how.device)
            dense = (min(height, self.dense_side), min(width, self.dense_side))
        return Wanted(self.plan.layers, tuple(grids), self.tokens_per_image, dense)

    def score(self, entry: NamedEncoder) -> None:
        """Climb the rungs with the features that were just taken, in the first process alone."""
        features = self.features
        if features is None:
            raise DataError(f"{entry.name} has no features.")
        cohort = self._cohort(features, entry.name)
        if entry is self.teacher:
            self.reference = replace(features, dense=None)
            self._measure_ceiling(entry, cohort)
        reference = None
        if self.teacher is not None and self.reference is not None and entry.name in self.grids:
            reference = Reference(self.teacher.name, self.reference, self.grids[entry.name])
        with self._timed(entry.name, "classifiers and fidelity"):
            self.console.print(f"Scoring {entry.name} on {len(cohort.split.test)} test images", markup=False)
            scores = score_encoder(features, cohort, reference, self.rungs, self.plan.layers)
        for rung in self._further:
            with self._timed(entry.name, rung):
                self.console.print(f"Rung {rung} of {entry.name}", markup=False)
                found = further_scores(
                    rung,
                    entry.module,
                    self.how,
                    self.console,
                    cohort=cohort,
                    data=self.data,
                    pooled=features.pooled,
                    pages=self.plan.pages,
                    linear=scores.linear,
                )
                scores = scores.with_rungs(found, self.how.seed)
        self.scores[entry.name] = scores
        self.features = None

    @property
    def _further(self) -> list[Rung]:
        return [rung for rung in FURTHER if rung in self.rungs]

    def _cohort(self, features: Features, name: str) -> Cohort:
        if self.cohort is None:
            self.cohort = choose_cohort(features, self.data, self.how.seed, self.console)
        if features.rows.tolist() != self.cohort.rows.tolist():
            raise DataError(f"{name} could read other images than the encoders before it; check the storage.")
        return self.cohort

    def _measure_ceiling(self, entry: NamedEncoder, cohort: Cohort) -> None:
        """Compare the teacher with itself on test images that were encoded again as JPEG, as in training."""
        grids = sorted(set(self.grids.values()))
        if "fidelity" not in self.rungs or not grids:
            return
        with self._timed(entry.name, "ceiling"):
            samples = cast(Samples, _Reencoded(self.data, rows_of(cohort, cohort.split.test), self.how.seed))
            wanted = Wanted(token_grids=(grids[-1],), tokens_per_image=self.tokens_per_image)
            name = f"{entry.name}, images encoded again"
            augmented = extract_features(entry.module, samples, self.how, wanted, name=name, console=self.console)
            if self.reference is None or len(augmented.rows) != len(cohort.split.test):
                raise DataError(f"{name}: not every test image could be read a second time; check the storage.")
            found = ceiling_scores(augmented, self.reference, cohort, grids[-1])
        entries = [item for score in found for item in score_entries(score, seed=self.how.seed)]
        self.ceiling = {"teacher": entry.name, "augmentation": "JPEG quality 75 to 100", "scores": entries}

    @contextmanager
    def _timed(self, name: str, what: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        mine = self.seconds.setdefault(name, {})
        mine[what] = round(mine.get(what, 0.0) + time.perf_counter() - start, 2)

    def result(self, names: Sequence[str]) -> Judged:
        """Return what was found, in the order of `names`."""
        if self.cohort is None:
            raise DataError("There is no encoder to score.")
        scores = {name: self.scores[name] for name in names}
        return Judged(self.cohort, self.rungs, self.plan.layers, scores, self.ceiling, self.seconds)


class _Reencoded:
    """Some images of a probe set, each written and read as a JPEG of random quality, as training does."""

    def __init__(self, data: ProbeSet, rows: list[int], seed: int) -> None:
        self.data, self.rows, self.seed = data, rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        row = self.rows[position]
        generator = generator_for(self.seed, row, AUGMENT_STREAM)
        image = augment(self.data.images.pixels(row), Augmentation(reencode="jpeg"), generator)
        label, domain = int(self.data.labels[row]), int(self.data.domain_ids[row])
        return {"image": square_view(image, self.data.img_size_px), "label": label, "domain": domain, "row": row}


def _common_grids(encoders: Sequence[NamedEncoder], teacher: NamedEncoder, how: Extraction) -> dict[str, Grid]:
    """For each encoder but teachers, the coarser of its grid and the teacher's, along each axis."""
    rows, columns = grid_of(teacher.module, how.img_size_px, device=how.device)
    grids: dict[str, Grid] = {}
    for entry in encoders:
        if entry.role != "teacher":
            mine = grid_of(entry.module, how.img_size_px, device=how.device)
            grids[entry.name] = (min(rows, mine[0]), min(columns, mine[1]))
        entry.module.to("cpu")
    return grids
