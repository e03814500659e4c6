"""The variants of the evidence study: recipes made from a base recipe and a few changes.

`configs/evidence/study.yaml` lists them; docs/results.md says what each is for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

Tool = Literal["distill", "lightly_train"]


INITIAL = "initialisation"


@dataclass(frozen=True)
class Variant:
    """One way to train the student.

    Attributes:
        name: of its folder and of its row in the tables.
        title: what a reader sees.
        tool: who trains it.
        recipe: of `distill fit`; for another tool what it is given of one, and `arguments` of its own.
        states: name of the folder with the teachers' states, shared by variants that need the same; empty runs the
            teachers in training.
        views: how many random crops of each training image are stored, where the recipe crops.
    """

    name: str
    title: str
    tool: Tool
    recipe: dict[str, Any]
    states: str
    views: int = 1

    @property
    def crops(self) -> bool:
        """Whether training sees random crops, which depend on the seed."""
        return "crop_scale_min" in self.recipe["data"].get("augment", {})

    @property
    def initial(self) -> str:
        """What its student began as; variants named "random" have a beginning of their own."""
        return f"{INITIAL} of {self.name}" if "random" in self.name else INITIAL

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of its teachers."""
        return tuple(self.recipe["model"]["teachers"])


@dataclass(frozen=True)
class Look:
    """Probes that judge encoders.

    Attributes:
        folder: for the results, in a run's folder.
        rungs: probes on the data sets.
        reads_receipts: whether the OCR probe on receipt crops is run.
    """

    folder: str
    rungs: tuple[str, ...]
    reads_receipts: bool = False


@dataclass(frozen=True)
class Study:
    """One setting of the study.

    Attributes:
        name: of the setting, for example "quick".
        img_size_px: side of the images in training and in the probes.
        datasets: that encoders are judged on.
        look: probes that judge every run.
        seeds: of training; one run a variant and seed.
        variants: in the order they are run.
        first_seed_only: names of variants that are run once.
        closer_look: probes that take too long for every run.
        looked_closer: names of variants whose first seed they judge.
        report: name of the variant whose first run gets a report; empty for none.
    """

    name: str
    img_size_px: int
    datasets: tuple[str, ...]
    look: Look
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    first_seed_only: tuple[str, ...]
    closer_look: Look
    looked_closer: tuple[str, ...]
    report: str = ""

    def states_name(self, variant: Variant, seed: int) -> str | None:
        """Return the name of the folder of a variant's teacher states; None where the teachers run in training."""
        if not variant.states:
            return None
        name = f"{variant.states}-{self.img_size_px}"
        return f"{name}-seed{seed}" if variant.crops else name

    def runs(self) -> list[tuple[Variant, int]]:
        """Return variants and seeds in the order they are run."""
        return [
            (variant, seed)
            for seed in self.seeds
            for variant in self.variants
            if seed == self.seeds[0] or variant.name not in self.first_seed_only
        ]


def with_changes(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe with values replaced.

    Args:
        recipe: nested mappings and lists.
        changes: by dotted path; a number stands for a place in a list, and null removes a key. A key that holds a dot
            cannot be reached.

    Raises:
        ValueError: a path leads nowhere; only its last key may be new.
    """
    changed = copy.deepcopy(dict(recipe))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = changed
        for key in parents:
            try:
                place = place[int(key)] if isinstance(place, list) else place[key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"the change {path!r} leads nowhere: there is no {key!r} in the recipe") from error
        if value is None:
            place.pop(last, None)
        else:
            place[int(last) if isinstance(place, list) else last] = copy.deepcopy(value)
    return changed


def read_study(file: Path, name: str, assets: Path, work: Path) -> Study:
    """Return one setting of the study.

    Args:
        file: study.yaml.
        name: of the setting.
        assets: folder of images and weights; takes the place of `../shared/assets` in the recipes.
        work: folder of the study's results; takes the place of `runs/evidence`.

    Raises:
        ValueError: there is no such setting or variant, or a change leads nowhere.
    """
    content = cast(dict[str, Any], yaml.safe_load(file.read_text("utf-8")))
    if name not in content["settings"]:
        raise ValueError(f"{file} has no setting {name!r}; it has {', '.join(content['settings'])}.")
    setting = content["settings"][name]
    closer = cast(dict[str, Any], setting.get("closer_look", {}))
    looked_closer = tuple(closer.get("variants", ()))
    unknown = [variant for variant in setting["variants"] if variant not in content["variants"]]
    once = tuple(setting.get("first_seed_only", ()))
    report = str(setting.get("report", ""))
    named = {*looked_closer, *once, report} - {""}
    unknown += sorted(named.difference(setting["variants"]))
    if unknown:
        raise ValueError(f"{file}: the setting {name!r} names unknown variants: {', '.join(unknown)}.")
    places = {"../shared/assets": str(assets), "runs/evidence": str(work)}
    variants = [
        _variant(key, content["variants"][key], setting.get("changes", {}), file.parent, places)
        for key in setting["variants"]
    ]
    return Study(
        name,
        int(setting["img_size_px"]),
        tuple(setting["datasets"]),
        Look("judge", tuple(setting["rungs"])),
        tuple(int(seed) for seed in setting["seeds"]),
        tuple(variants),
        once,
        Look("judge/closer", tuple(closer.get("rungs", ())), bool(closer.get("reads_receipts", False))),
        looked_closer,
        report,
    )


def _variant(
    name: str, entry: Mapping[str, Any], shared: Mapping[str, Any], folder: Path, places: Mapping[str, str]
) -> Variant:
    base = yaml.safe_load((folder / entry["base"]).read_text("utf-8"))
    recipe = _placed(with_changes(base, {**shared, **entry.get("changes", {})}), places)
    tool = entry.get("tool", "distill")
    if tool != "distill":
        recipe = {**_of_a_recipe(recipe), "arguments": entry.get("arguments", {})}
    return Variant(name, entry["title"], tool, recipe, entry.get("states", ""), entry.get("views", 1))


def _of_a_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what another tool is given of a recipe: models, and how many images of which size and batch."""
    model, data = recipe["model"], recipe["data"]
    students = copy.deepcopy(model["students"])
    for spec in students.values():
        spec["init_args"].pop("frozen", None)
    return {
        "trainer": {"max_epochs": recipe["trainer"]["max_epochs"]},
        "model": {"students": students, "teachers": model["teachers"]},
        "data": {key: data[key] for key in ("global_batch_size", "samples_per_epoch")},
    }


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    """Put real folders in the place of those that the recipes name."""
    if isinstance(value, dict):
        return {key: _placed(item, places) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_placed(item, places) for item in cast(list[Any], value)]
    if isinstance(value, str):
        for prefix, real in places.items():
            if value == prefix or value.startswith(prefix + "/"):
                return real + value.removeprefix(prefix)
    return value
