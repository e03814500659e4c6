"""Run the evidence study: prepare, cache the teachers, train every variant, judge it, write tables and a report.

    python scripts/evidence/study.py quick --assets ../shared/assets --work runs/evidence
    python scripts/evidence/study.py full --lightly_python runs/evidence/lightly/bin/python

Each step leaves a file when it is finished, and a finished step is not repeated: after whatever stopped the study, the
same command goes on. As many steps as there are cores are under way at a time, each with one thread, which does more
than one step with them all; `--jobs` says otherwise. Training itself goes on from its last checkpoint (LightlyTrain's
begins anew); a run whose recipe has changed is refused. Each training's CPU and wall time are kept in `cost.json`
beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import yaml
from collect import company
from rich.console import Console
from steps import Commands, Cost, Step, StepError, perform
from variants import Look, Study, Variant, read_study

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = "recipe.yaml"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Driver:
    """Makes the steps of a study.

    Args:
        study: what is run.
        work: folder of everything that is made.
        assets: images and weights.
        lightly_python: Python of LightlyTrain's environment; None leaves its variants out.
        commands: runs what the steps start.
    """

    def __init__(self, study: Study, work: Path, assets: Path, lightly_python: Path | None, commands: Commands) -> None:
        self.study, self.work, self.assets, self.lightly_python = study, work, assets, lightly_python
        self.commands = commands
        self.data, self.runs = work / "data", work / study.name

    def steps(self) -> list[Step]:
        """Return all steps, in order: of each seed first the trainings, then the judgings; what takes long comes last.

        Raises:
            StepError: a run is there that another recipe made, or states of other views.
        """
        python, study = sys.executable, self.study
        splits = self.data / "splits.json"
        words = [python, str(HERE / "prepare.py"), str(self.assets), str(self.data)]
        prepare = Step("images: splits and shards", splits.is_file, lambda: self._plain(words, "prepare"))
        ordered, closer = [prepare], list[Step]()
        known: dict[Path, Step] = {}
        for seed, runs in groupby(study.runs(), key=lambda run: run[1]):
            trainings, judgings = list[Step](), list[Step]()
            for variant, _ in runs:
                if variant.tool != "distill" and self.lightly_python is None:
                    continue
                self.check_recipe(variant, seed)
                needs, states = [prepare], self.states_of(variant, seed)
                if states is not None:
                    if states not in known:
                        known[states] = self._cache_step(variant, seed, states, prepare)
                        trainings.append(known[states])
                    needs.append(known[states])
                train = self._train_step(variant, seed, *needs)
                trainings.append(train)
                judgings += self._judge_steps(variant, seed, study.look, known, train)
                if variant.name in study.looked_closer and seed == study.seeds[0]:
                    closer += self._judge_steps(variant, seed, study.closer_look, known, train)
                if variant.name == study.report and seed == study.seeds[0]:
                    judgings.append(self._report_step(variant, seed, train, *judgings))
            ordered += trainings + judgings
        return ordered + closer

    def states_of(self, variant: Variant, seed: int) -> Path | None:
        """Return the folder of a variant's teacher states."""
        name = self.study.states_name(variant, seed)
        return None if name is None else self.work / "states" / name

    def run_of(self, variant: Variant, seed: int) -> Path:
        """Return the folder of a variant's run."""
        return self.runs / f"{variant.name}-seed{seed}"

    def recipe_of(self, variant: Variant, seed: int, run: Path) -> str:
        """Return the recipe of a run, as YAML."""
        recipe = {**variant.recipe, "seed_everything": seed}
        recipe["trainer"] = {**recipe["trainer"], "default_root_dir": str(run)}
        recipe["data"] = {**recipe["data"], "seed": seed, "img_size_px": self.study.img_size_px}
        states = self.states_of(variant, seed)
        if states is not None:
            recipe["model"] = {**recipe["model"], "teacher_states": str(states)}
        return yaml.safe_dump(recipe, sort_keys=False)

    def _written_recipe(self, variant: Variant, seed: int, run: Path) -> Path:
        run.mkdir(parents=True, exist_ok=True)
        file = run / RECIPE
        file.write_text(self.recipe_of(variant, seed, run), encoding="utf-8")
        return file

    def check_recipe(self, variant: Variant, seed: int) -> None:
        """Refuse a run that was made by another recipe than its variant has now.

        Raises:
            StepError: with the way out.
        """
        run = self.run_of(variant, seed)
        file = run / RECIPE
        if file.is_file() and yaml.safe_load(file.read_text("utf-8")) != yaml.safe_load(
            self.recipe_of(variant, seed, run)
        ):
            raise StepError(
                f"{file} is not what {variant.name} has come to mean: the study's files, or the folders they are read "
                f"from, have changed since. Move {run} out of {self.runs} to train it anew, or undo the change."
            )

    def write_tables(self, study_file: Path) -> None:
        """Write the tables."""
        tables = [sys.executable, str(HERE / "tables.py"), str(self.runs), "--study", str(study_file)]
        self._plain(tables, "tables")

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.runs / "report.html"

    def _plain(self, words: list[str], name: str) -> Cost:
        return self.commands.run(words, self.work / "logs" / f"{name}.log", self._environment())

    def _cache_step(self, variant: Variant, seed: int, states: Path, *needs: Step) -> Step:
        done = states / "complete.json"
        views = min(variant.views, variant.recipe["trainer"]["max_epochs"])  # more would not be seen
        if done.is_file() and (found := json.loads(done.read_text("utf-8")).get("views", views)) != views:
            raise StepError(
                f"{states} has {found} views of each image, and {variant.name} wants {views}. Give its `states` "
                "another name in the study's file, or move the folder away."
            )

        def fill() -> None:
            states.mkdir(parents=True, exist_ok=True)
            # The recipe with the teachers themselves.
            recipe = self._written_recipe(replace(variant, states=""), seed, self.work / "logs" / states.name)
            words = [sys.executable, "-m", "distill", "cache", str(recipe), "--out", str(states)]
            words += ["--compression", "fp16", "--views", str(views)]
            cost = self._plain(words, states.name)
            done.write_text(json.dumps({**cost._asdict(), "views": views}), encoding="utf-8")

        return Step(f"teacher states: {states.name}", done.is_file, fill, needs)

    def _train_step(self, variant: Variant, seed: int, *needs: Step) -> Step:
        run = self.run_of(variant, seed)
        done, begun, log = run / "cost.json", run / "begun", run / "fit.log"

        def train() -> None:
            # What an interrupted run had used is not known; LightlyTrain begins anew.
            is_whole = variant.tool != "distill" or not begun.is_file()
            recipe = self._written_recipe(variant, seed, run)
            begun.touch()
            cost = self.commands.run(self._training(variant, seed, recipe, run), log, self._environment_of(variant))
            images = variant.recipe["data"]["samples_per_epoch"] * variant.recipe["trainer"]["max_epochs"]
            content = {**cost._asdict(), "images": images, "is_whole": is_whole}
            done.write_text(json.dumps(content), encoding="utf-8")

        return Step(f"train: {variant.title}, seed {seed}", done.is_file, train, needs)

    def _training(self, variant: Variant, seed: int, recipe: Path, run: Path) -> list[str]:
        if variant.tool == "distill":
            return [sys.executable, "-m", "distill", "fit", "--config", str(recipe), "--resume", "auto"]
        # -P and no PYTHONPATH: a module of this folder must not stand in for one of LightlyTrain's.
        words = [str(self.lightly_python), "-P", str(HERE / "peer.py"), str(recipe), "--out", str(run)]
        return [*words, "--images", str(self.data / "train-files"), "--seed", str(seed)]

    def _environment_of(self, variant: Variant) -> dict[str, str]:
        return {**self._environment(), **({} if variant.tool == "distill" else {"PYTHONPATH": ""})}

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}

    def _judge_steps(self, variant: Variant, seed: int, look: Look, known: dict[Path, Step], train: Step) -> list[Step]:
        """Judge a run's student, and its initialisation and teachers where no earlier run had the same."""
        run, name = self.run_of(variant, seed), f"{variant.name}, seed {seed}"
        if variant.tool != "distill":
            return [self._judged(run / "encoder.yaml", "student", run / look.folder, look, name, train)]
        found = [self._judged(run, "student", run / look.folder, look, name, train)]
        for title, role in ((variant.initial, "initial"), (" and ".join(variant.teachers), "teacher")):
            out = company(self.runs, role, title) / look.folder
            if out not in known:
                known[out] = self._judged(run, role, out, look, title, train)
                found.append(known[out])
        return found

    def _report_step(self, variant: Variant, seed: int, *needs: Step) -> Step:
        """Write the report of a run: on the study's first data set, with its company."""
        run = self.run_of(variant, seed)
        data = self.data / "probe" / f"{self.study.datasets[0]}.csv"
        probe = [sys.executable, "-m", "distill", "probe", str(run), "--data", str(data), "--leaks", "off"]
        probe += ["--rungs", "[linear,knn,fidelity]", "--cache", str(self.work / "features")]
        probe += ["--img_size_px", str(self.study.img_size_px)]
        report = [sys.executable, "-m", "distill", "report", str(run), "--out", str(self.report)]
        trained = run / "cost.json"

        def is_done() -> bool:
            return self.report.is_file() and self.report.stat().st_mtime >= trained.stat().st_mtime

        def write() -> None:
            self._plain(probe, "report")
            self._plain(report, "report")

        return Step(f"report: {variant.name}, seed {seed}", is_done, write, needs)

    def _judged(self, encoder: Path, role: str, out: Path, look: Look, title: str, train: Step) -> Step:
        study = self.study
        files = [out / f"{dataset}.json" for dataset in study.datasets]
        files += [out / "receipts.json"] if look.reads_receipts else []
        words = [sys.executable, str(HERE / "judge.py"), str(encoder), "--data", str(self.data), "--out", str(out)]
        words += ["--size", str(study.img_size_px), "--datasets", ",".join(study.datasets)]
        words += ["--rungs", ",".join(look.rungs), "--role", role, "--cache", str(self.work / "features")]
        words += ["--receipts"] if look.reads_receipts else []
        return Step(
            f"{look.folder}: {title}",
            lambda: all(file.is_file() for file in files),
            lambda: self.commands.run(words, out / "judge.log", self._environment()),
            (train,),
        )


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", help="of study.yaml: quick, full, controls, large, ablation or ablation_more")
    parser.add_argument("--study", type=Path, default=ROOT / "configs" / "evidence" / "study.yaml")
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--lightly_python", type=Path, help="without it LightlyTrain is left out")
    parser.add_argument("--jobs", type=int, default=CORES, help="steps at a time, each with its share of the cores")
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs} must be 1 or more")
    # Ctrl-C reaches the running step by itself; a plain kill has to be handed on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console, work, assets = Console(), asked.work.resolve(), asked.assets.resolve()
    try:
        study = read_study(asked.study, asked.setting, assets, work)
        commands = Commands(ROOT, threads=max(1, CORES // asked.jobs))
        driver = Driver(study, work, assets, asked.lightly_python and asked.lightly_python.absolute(), commands)
        perform(driver.steps(), console, asked.jobs, commands.stop)
        driver.write_tables(asked.study)
    except (StepError, ValueError) as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(f"Tables: {driver.runs / 'results.md'}", markup=False, highlight=False)
    if study.report:
        console.print(f"Report: {driver.report}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
