"""The verb `distill compare`: encoders of several probes, paired image by image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
from rich.console import Console
from rich.progress import track

from distill.errors import ConfigError, DataError
from distill.probe.contenders import Contender, Figure, PerImageFiles, Which, read_contenders
from distill.probe.intervals import NUM_RESAMPLES
from distill.probe.paired_ratio import paired_figure, restrict
from distill.probe.results import OVERALL, At, EncoderScores, MetricInfo, Score
from distill.probe.rung import Kind, PerImage

Cluster = Literal["group", "none"]
NOT_PAIRED = "not paired"


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of one encoder beside the baseline's.

    Attributes:
        metric: its name.
        info: its title and kind.
        at: point of a curve, or None.
        scope: "overall" or a domain.
        label: of the encoder.
        value: its figure.
        baseline: the baseline's figure.
        difference: `value - baseline`.
        low: lower end of the 95 % interval of the difference; None where there is none.
        high: its upper end.
        n: images; None where a probe of format 1 does not say.
        num_clusters: what was resampled; None where nothing was paired.
        verdict: "better", "worse", "not distinguishable", or "not paired" without per-image values.
    """

    metric: str
    info: MetricInfo
    at: At | None
    scope: str
    label: str
    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    n: int | None
    num_clusters: int | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What `distill compare` found.

    Attributes:
        baseline: label of the encoder that the others are compared with.
        labels: of all encoders, the baseline first.
        files: the `probe.json` of each label.
        figures: by metric and point of a curve, then scope, then encoder.
        notes: what was left out and why, and what could not be paired.
        cluster: what was resampled.
        seed: of the resampling.
    """

    baseline: str
    labels: tuple[str, ...]
    files: dict[str, Path]
    figures: list[ComparedFigure] = field(default_factory=list[ComparedFigure])
    notes: list[str] = field(default_factory=list[str])
    cluster: Cluster = "group"
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES


def compare(
    probes: list[Path],
    *,
    baseline: str | None = None,
    cluster: Cluster = "group",
    encoders: Which = "students",
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """Compare encoders of several probes: paired differences on the same images, each with a 95 % interval.

    "Better" is said only where the interval of the difference leaves out zero. The table in the terminal has the
    figures over all domains; files have those of each domain too.

    Args:
        probes: probe.json files, run directories, or folders with a probe.json, apart by spaces.
        baseline: the encoder that the others are compared with, by the name in the table or by one of the paths; the
            first when left out.
        cluster: group resamples whole groups (photographs, documents), none single images.
        encoders: students takes of each probe the distilled students (or the encoder it was made for); all takes its
            initialisations, teachers and others as well.
        out: a file to write, .csv, .json or .md, or a folder for all three.
        seed: of the resampling.

    Raises:
        ConfigError: a path holds no probe, an option cannot be used, or fewer than two encoders are left.
        DataError: a file is damaged or missing, the probes are of different images, or have nothing in common.
    """
    # The tables import the types from here.
    from distill.probe.compare_tables import check_out, print_comparison, write_comparison

    if seed < 0:
        raise ConfigError(f"--seed {seed} must be 0 or more.")
    check_out(out)
    contenders = read_contenders(probes, encoders)
    console = Console()
    found = compare_contenders(contenders, baseline, cluster=cluster, seed=seed, console=console)
    print_comparison(found, console)
    for file in write_comparison(found, out):
        console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)


def compare_contenders(
    contenders: Sequence[Contender],
    baseline: str | None = None,
    *,
    cluster: Cluster = "group",
    seed: int = 0,
    console: Console | None = None,
) -> Comparison:
    """Compare every contender with the baseline on all figures that both have of the same images.

    Args:
        contenders: two or more.
        baseline: label, encoder name or path of the baseline; None takes the first.
        cluster: see `compare`.
        seed: of the resampling.
        console: where progress is shown; None shows none.

    Raises:
        ConfigError: there are fewer than two, or the baseline is none of them.
        DataError: see `compare`.
    """
    if len(contenders) < 2:
        raise ConfigError(
            f"There is nothing to compare: {', '.join(entry.label for entry in contenders) or 'no encoder'} stands "
            "alone. Give two probes or more, or --encoders all to compare the encoders of one."
        )
    base = _baseline(contenders, baseline)
    others = [entry for entry in contenders if entry is not base]
    labels = (base.label, *(entry.label for entry in others))
    files = {entry.label: entry.file for entry in (base, *others)}
    found = Comparison(base.label, labels, files, cluster=cluster, seed=seed)
    reader = PerImageFiles()
    for other in track(others, "comparing", console=console, transient=True, disable=console is None):
        found.figures.extend(_pair(other, base, reader, found))
    if not found.figures:
        raise DataError("The probes have no figure in common that can be compared. " + " ".join(found.notes))
    order = {key: number for number, key in enumerate(dict.fromkeys(_row_key(entry) for entry in found.figures))}
    found.figures.sort(key=lambda entry: (order[_row_key(entry)], labels.index(entry.label)))
    return found


def _row_key(entry: ComparedFigure) -> tuple[str, At | None, str]:
    return entry.metric, entry.at, entry.scope


def _baseline(contenders: Sequence[Contender], wanted: str | None) -> Contender:
    if wanted is None:
        return contenders[0]
    path = Path(wanted).resolve()
    for matches in (
        [entry for entry in contenders if entry.label == wanted],
        [entry for entry in contenders if entry.scores.name == wanted],
        [entry for entry in contenders if path in (entry.file.resolve(), entry.file.resolve().parent)],
    ):
        if len(matches) == 1:
            return matches[0]
    listing = ", ".join(repr(entry.label) for entry in contenders)
    raise ConfigError(f"--baseline {wanted!r} names none, or several, of the encoders; choose one of {listing}.")


def _pair(other: Contender, base: Contender, reader: PerImageFiles, found: Comparison) -> Iterator[ComparedFigure]:
    """Yield the figures of one encoder beside the baseline's, and note what cannot be compared."""
    if not other.results.tensors or not base.results.tensors:
        yield from _unpaired(other, base, found)
        return
    mine, theirs = other.entries, base.entries
    common = [figure for figure in theirs if figure in mine]
    reasons: dict[str, list[str]] = {}
    for figure in common:
        if mine[figure].data != theirs[figure].data:
            reasons.setdefault("other images (the data's fingerprints differ)", []).append(_name(base, figure))
            continue
        a, b = reader.read(other, figure), reader.read(base, figure)
        if not np.array_equal(a.rows, b.rows):
            shared = len(np.intersect1d(a.rows, b.rows))
            reason = f"other images ({len(a.rows)} and {len(b.rows)}, {shared} in common: probe with equal --seed)"
            reasons.setdefault(reason, []).append(_name(base, figure))
            continue
        if a.numerator.shape != b.numerator.shape:
            reasons.setdefault("other classes", []).append(_name(base, figure))
            continue
        yield from _scopes(other, base, figure, (a, b), found)
    absent = [_name(other, figure) for figure in mine if figure not in theirs]
    absent += [_name(base, figure) for figure in theirs if figure not in mine]
    if absent:
        reasons["measured for one of the two only"] = absent
    for reason, names in reasons.items():
        found.notes.append(f"Not compared, {other.label} with {base.label}, {reason}: {', '.join(names)}.")


def _name(contender: Contender, figure: Figure) -> str:
    metric, at = figure
    title = contender.results.info(metric).title
    return title if at is None else f"{title} at {at[0]} {at[1]:g}"


def _scopes(
    other: Contender, base: Contender, figure: Figure, sides: tuple[PerImage, PerImage], found: Comparison
) -> Iterator[ComparedFigure]:
    metric, at = figure
    info = base.results.info(metric)
    a, b = sides
    scopes = {OVERALL: np.ones(len(a.rows), dtype=np.bool_)}
    names = base.entries[figure].domain_names
    if b.domains is not None and names:
        scopes |= {name: b.domains == number for number, name in enumerate(names) if (b.domains == number).any()}
    for scope, mask in scopes.items():
        parts = restrict(a, mask), restrict(b, mask)
        if not (parts[0].denominator.sum() > 0 and parts[1].denominator.sum() > 0):
            continue
        pair = paired_figure(*parts, cast(Kind, info.kind), clustered=found.cluster == "group", seed=found.seed)
        verdict = pair.verdict(lower_is_better=info.lower_is_better)
        yield ComparedFigure(
            metric,
            info,
            at,
            scope,
            other.label,
            pair.value,
            pair.baseline,
            pair.difference,
            pair.low,
            pair.high,
            pair.n,
            pair.num_clusters,
            verdict,
        )


def _unpaired(other: Contender, base: Contender, found: Comparison) -> Iterator[ComparedFigure]:
    """Yield the figures of probes without per-image values, with no interval of the difference and no verdict."""
    prints = [str(entry.results.data.get("fingerprint", "")) for entry in (other, base)]
    if prints[0] != prints[1]:
        raise DataError(
            f"{other.file} and {base.file} are of different images (data fingerprints {prints[0][:12] or 'none'} and "
            f"{prints[1][:12] or 'none'}). Probe both on the same --data."
        )
    old = " and ".join(str(entry.file) for entry in (other, base) if not entry.results.tensors)
    found.notes.append(
        f"Not paired, {other.label} with {base.label}: {old} has no per-image values (format distill-probe/1), so a "
        "difference has no interval and no verdict. Probe again to pair."
    )
    for metric, at, scope, score, theirs in _common(other.scores, base.scores):
        yield ComparedFigure(
            metric,
            base.results.info(metric),
            at,
            scope,
            other.label,
            score.value,
            theirs.value,
            score.value - theirs.value,
            None,
            None,
            score.n,
            None,
            NOT_PAIRED,
        )


def _common(a: EncoderScores, b: EncoderScores) -> Iterator[tuple[str, At | None, str, Score, Score]]:
    """Yield metric, point, scope and both figures of everything that two encoders have."""
    for metric, scopes in b.scores.items():
        for scope, score in scopes.items():
            if scope in a.of(metric):
                yield metric, None, scope, a.of(metric)[scope], score
    for (metric, axis), by_scope in b.curves.items():
        for scope, points in by_scope.items():
            mine = dict(a.curves.get((metric, axis), {}).get(scope, []))
            for x, score in points:
                if x in mine:
                    yield metric, (axis, x), scope, mine[x], score
