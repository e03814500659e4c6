"""Write the tables of the evidence study from its result files.

    python scripts/evidence/tables.py runs/evidence/full
    python scripts/evidence/tables.py runs/evidence/full --into docs/results.md

The folder's name is the setting's. Writes `results.md` in the folder; `--into` puts the same text between the two marks
`<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page, NAME being the folder's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from collect import RECEIPTS, Arm, Key, collect
from intervals import difference, gap_closed
from variants import Study, read_study

DATASETS = ("trashnet", "dtd10", "chart25", "gaokao_mm", "sroie_page")
SCOPES = {
    "natural": ("trashnet", "dtd10"),
    "multidisciplinary": ("gaokao_mm",),
    "charts": ("chart25",),
    "receipts": ("sroie_page",),
    "all data sets": DATASETS,
}
METRICS = {"knn_top1": "kNN", "linear_top1": "linear probe", "attentive_top1": "attentive probe"}
RIVALS = ("lightly_train", "lightly_train_tuned", "pooled_mse", "no_crops")
STUDY = Path(__file__).resolve().parents[2] / "configs" / "evidence" / "study.yaml"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figure(arm: Arm, key: Key) -> str:
    """Return an arm's figure in percent, with the standard deviation over its seeds where it has several."""
    values = 100 * arm.values(key)
    if not len(values):
        return ""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def keys_of(scope: str, metric: str, arms: Sequence[Arm]) -> list[Key] | None:
    """Return the figures of a scope; None where an arm lacks one. Data sets that no arm has are passed over."""
    keys = [(dataset, metric) for dataset in SCOPES[scope]]
    known = [key for key in keys if any(key in arm.figures for arm in arms)]
    return known if known and all(key in arm.figures for key in known for arm in arms) else None


def figures_table(arms: Sequence[Arm], metric: str) -> str:
    """Return every arm's figures on every data set."""
    keys = [(dataset, metric) for dataset in DATASETS if any((dataset, metric) in arm.figures for arm in arms)]
    counts = {key: next(len(arm.parts(key)[0].rows) for arm in arms if key in arm.figures) for key in keys}
    head = ["encoder", "seeds", *(f"{key[0]} (n {counts[key]})" for key in keys), "mean"]
    rows = []
    for arm in arms:
        if all(key in arm.figures for key in keys):
            mean = 100 * np.mean([arm.values(key).mean() for key in keys])
            seeds = str(len(arm.figures[keys[0]]))
            rows.append([arm.name, seeds, *(figure(arm, key) for key in keys), f"{mean:.1f}"])
    return table(head, rows)


def differences_table(arms: Sequence[Arm], baseline_of: Callable[[Arm], Arm | None], metrics: Sequence[str]) -> str:
    """Return paired differences in points, with 95 % intervals, for each scope."""
    rows: list[list[str]] = []
    for arm in arms:
        baseline = baseline_of(arm)
        if baseline is None:
            continue
        for metric in metrics:
            pair, cells, seeds = (arm, baseline), [], ""
            for scope in SCOPES:
                keys = keys_of(scope, metric, pair)
                cells.append(difference(arm, baseline, keys).text() if keys else "")
                seeds = f"{seeds_of(arm, keys)}, {seeds_of(baseline, keys)}" if keys else seeds
            if any(cells):
                rows.append([arm.name, baseline.name, seeds, METRICS[metric], *cells])
    return table(["encoder", "less", "seeds", "probe", *SCOPES], rows)


def gap_table(variants: Sequence[Arm], arms: Mapping[str, Arm]) -> str:
    """Return how much of the gap between its beginning and its best teacher each variant closes in natural kNN."""
    rows: list[list[str]] = []
    for arm in variants:
        initial, teachers = initial_of(arm, arms), teachers_of(arm, arms)
        if initial is None or not teachers:
            continue
        keys = keys_of("natural", "knn_top1", [arm, initial, *teachers])
        if keys:
            best = max(teachers, key=lambda teacher: float(np.mean([teacher.values(key).mean() for key in keys])))
            share = gap_closed(arm, initial, best, keys)
            ends = f"[{100 * share.low:.0f}, {100 * share.high:.0f}]"
            rows.append([arm.name, seeds_of(arm, keys), initial.name, best.name, f"{100 * share.value:.0f} % {ends}"])
    return table(["encoder", "seeds", "from", "to", "gap closed in kNN, natural"], rows)


def initial_of(arm: Arm, arms: Mapping[str, Arm]) -> Arm | None:
    """Return what a variant's student began as, where it was judged."""
    return None if arm.variant is None else arms.get(arm.variant.initial)


def teachers_of(arm: Arm, arms: Mapping[str, Arm]) -> list[Arm]:
    """Return a variant's teachers that were judged."""
    names = () if arm.variant is None else arm.variant.teachers
    return [arms[f"teacher {name}"] for name in names if f"teacher {name}" in arms]


def seeds_of(arm: Arm, keys: Sequence[Key]) -> str:
    """Return how many seeds a row is of."""
    return str(min(len(arm.parts(key)) for key in keys))


def costs_table(arms: Sequence[Arm]) -> str:
    """Return what the trainings cost, and the stored states that they read."""
    rows: list[list[str]] = []
    for arm in arms:
        if arm.costs:
            costs = list(arm.costs.values())
            least = "" if all(cost.get("is_whole", True) for cost in costs) else "at least "
            cpu, wall = (np.mean([cost[name] for cost in costs]) for name in ("cpu_s", "wall_s"))
            states = [cost["states_cpu_s"] for cost in costs if "states_cpu_s" in cost]
            stored = f"{np.mean(states):.0f}" if states else ""
            images = f"{costs[0]['images']:,}"
            rows.append([arm.name, str(len(costs)), images, f"{least}{cpu:.0f}", stored, f"{least}{wall:.0f}"])
    head = ["variant", "seeds", "images seen", "CPU s a run", "and for stored states, CPU s", "wall s a run"]
    return table(head, rows)


def receipts_table(arms: Sequence[Arm], baseline_of: Callable[[Arm], Arm | None]) -> str:
    """Return the character error rates on held-out receipt crops."""
    rows: list[list[str]] = []
    for arm in arms:
        if RECEIPTS in arm.figures:
            baseline = baseline_of(arm)
            paired = difference(arm, baseline, [RECEIPTS]).text() if baseline and RECEIPTS in baseline.figures else ""
            rows.append([arm.name, figure(arm, RECEIPTS), paired])
    return table(["encoder", "character error rate, %", "less its initialisation"], rows)


def variants_table(variants: Sequence[Arm]) -> str:
    """Return what each variant is."""
    return table(["variant", "what it is"], [[arm.name, arm.variant.title] for arm in variants if arm.variant])


def write_tables(folder: Path, study: Study) -> str:
    """Return all tables of a study's folder as Markdown."""
    arms = collect(folder, study)
    variants = [arm for arm in arms.values() if arm.kind == "variant"]
    everyone = list(arms.values())

    def initial(arm: Arm) -> Arm | None:
        return initial_of(arm, arms)

    parts = [variants_table(variants)]
    parts += [
        f"### {title}, top-1 %\n\n{figures_table(everyone, metric)}"
        for metric, title in METRICS.items()
        if any(key[1] == metric for arm in everyone for key in arm.figures)
    ]
    parts.append(f"### Less the initialisation, points\n\n{differences_table(variants, initial, list(METRICS))}")
    for rival in RIVALS:
        if rival in arms:
            others = [arm for arm in variants if arm.name != rival]
            text = differences_table(others, lambda _, rival=rival: arms[rival], list(METRICS))
            parts.append(f"### Less {rival}, points\n\n{text}")
    parts.append(f"### Gap to the best teacher\n\n{gap_table(variants, arms)}")
    if any(RECEIPTS in arm.figures for arm in everyone):
        parts.append(f"### Reading receipts\n\n{receipts_table(everyone, initial)}")
    parts.append(f"### Cost\n\n{costs_table(variants)}")
    return "\n\n".join(parts) + "\n"


def put_between(page: str, name: str, text: str) -> str:
    """Return a page with the text between its two marks replaced.

    Raises:
        ValueError: the page lacks a mark.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no marks {begin} and {end}; add them where the tables belong")
    return page.partition(begin)[0] + f"{begin}\n\n{text}\n{end}" + page.partition(end)[2]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, help="page whose marked part is replaced")
    parser.add_argument("--study", type=Path, default=STUDY)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    # Titles, seeds and teachers are all that is read of the recipes: where assets lie does not matter.
    text = write_tables(folder, read_study(asked.study, folder.name, folder.parent, folder.parent))
    (asked.folder / "results.md").write_text(text, encoding="utf-8")
    if asked.into is not None:
        page = asked.into.read_text("utf-8")
        asked.into.write_text(put_between(page, folder.name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
