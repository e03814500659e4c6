"""Ablations: the cells of a grid, going on where it stands, and the table with seeds and intervals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from distill.data.pack.durable import durable_file
from distill.errors import ConfigError, UnfinishedError
from distill.report.html import Page, RunFacts, render
from distill.report.small_vlms import vlm_section
from distill.vlm import ablate as verb
from distill.vlm.ablate import Settings, run_cells
from distill.vlm.ablation_grid import read_grid
from distill.vlm.ablation_table import markdown, read_ablation, tabulate, write_ablation
from distill.vlm.answers import Answer, read_questions
from distill.vlm.runs import STAGE_FORMAT, VLMRun
from distill.vlm.score_files import write_scores

QUIET = Console(quiet=True)
SETTINGS = Settings(batch_size=4, device="cpu", max_hours=None, seed=0)
ENCODER = {"name": "encoder", "role": "other", "source": "here", "embed_dim": 8, "num_params": 1}
RIGHT = {"a": 0.5, "b": 0.9}
"""Share of right answers by encoder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe, a grid of 2 x 2 cells with two seeds, and 40 questions."""
    recipe = {
        "vision": {"path": "a"},
        "connector": {"name": "mlp"},
        "language": {"path": "l"},
        "run_dir": "r",
        "stages": {"s": {"lr": {"connector": 1.0}, "data": {"d": {"path": "d.jsonl"}}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (tmp_path / "questions.jsonl").open("w") as stream:
        for number in range(40):
            turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(number % 4)}]
            stream.write(json.dumps({"id": f"q{number}", "kind": "count", "conversations": turns}) + "\n")
    write_grid(tmp_path)
    return tmp_path


def write_grid(folder: Path, **overrides: Any) -> Path:
    grid = {
        "recipe": [str(folder / "recipe.yaml")],
        "steps": {"s": 5},
        "seeds": [0, 1],
        "questions": str(folder / "questions.jsonl"),
        "axes": {
            "encoder": {"a": {"vision": {"path": "a"}}, "b": {"vision": {"path": "b"}}},
            "connector": {"mlp": {}, "ldp": {"connector": {"name": "ldp"}}},
        },
        **overrides,
    }
    target = folder / "grid.yaml"
    target.write_text(yaml.safe_dump({key: value for key, value in grid.items() if value is not None}, sort_keys=False))
    return target


def answer_cell(content: dict[str, Any], questions: Path, settings: Settings, console: Console) -> None:
    """Leave what training and scoring leave, with answers of which a share is right; the seed moves it a little."""
    run = VLMRun(content["run_dir"])
    run.begin(content, resume="auto")
    stage = run.stage_dir(1, "s")
    stage.mkdir(parents=True, exist_ok=True)
    with durable_file(stage / "stage.json") as file:
        file.write(json.dumps({"format": STAGE_FORMAT, "seconds": 3.0}).encode())
    asked = read_questions(questions)
    generator = np.random.default_rng([content["seed"], content["vision"]["path"] == "b"])
    right = generator.permutation(len(asked)) < RIGHT[content["vision"]["path"]] * len(asked)
    answers = [Answer(question, "x", float(value)) for question, value in zip(asked, right, strict=True)]
    write_scores(answers, run.path / "probe.json", encoder=ENCODER, data=questions, seed=0, settings={})


@pytest.fixture
def ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Path]:
    monkeypatch.setattr(verb, "run_cell", answer_cell)
    return run_cells(read_grid(folder / "grid.yaml"), folder / "out", SETTINGS, QUIET)


def test_a_grid_has_a_cell_for_every_combination_at_equal_budget(folder: Path) -> None:
    grid = read_grid(folder / "grid.yaml")
    assert [cell.name for cell in grid.cells] == [
        "encoder=a+connector=mlp",
        "encoder=a+connector=ldp",
        "encoder=b+connector=mlp",
        "encoder=b+connector=ldp",
    ]
    assert grid.baseline is grid.cells[0]
    assert {cell.content["stages"]["s"]["steps"] for cell in grid.cells} == {5}
    assert grid.cells[3].content["vision"]["path"] == "b"
    assert grid.cells[3].content["connector"]["name"] == "ldp"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"axes": {}}, "axes names no axis"),
        ({"axes": {"encoder": {"a": "path"}}}, "axes.encoder must name its alternatives"),
        ({"steps": {"t": 5}}, "steps.t is for a stage that the recipe lacks"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"baseline": {"encoder": "c"}}, "is no cell"),
        ({"questions": None}, "missing questions"),
        ({"sedes": [1]}, "unknown key\\(s\\) sedes"),
        ({"axes": {"encoder": {"a": {"vison": {"path": "a"}}}}}, "The cell encoder=a cannot be built"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_before_anything_is_trained(
    folder: Path, overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        read_grid(write_grid(folder, **overrides))


def test_every_cell_is_run_with_every_seed_in_a_folder_of_its_own(ran: dict[tuple[str, int], Path]) -> None:
    assert len(ran) == 8
    assert {VLMRun(path).content()["seed"] for path in ran.values()} == {0, 1}
    assert len(set(ran.values())) == 8


def test_what_was_run_before_is_kept(
    folder: Path, ran: dict[tuple[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ran["encoder=b+connector=ldp", 1]
    (gone / "probe.json").unlink()
    repeated: list[str] = []

    def noted(content: dict[str, Any], *arguments: Any) -> None:
        repeated.append(content["run_dir"])
        answer_cell(content, *arguments)

    monkeypatch.setattr(verb, "run_cell", noted)
    run_cells(read_grid(folder / "grid.yaml"), folder / "out", SETTINGS, QUIET)
    assert repeated == [str(gone)]


def test_other_questions_are_asked_of_all_cells_again(
    folder: Path, ran: dict[tuple[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (folder / "questions.jsonl").read_text().splitlines()[:20]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    repeated: list[Any] = []
    monkeypatch.setattr(verb, "run_cell", lambda *arguments: repeated.append(arguments))
    run_cells(read_grid(folder / "grid.yaml"), folder / "out", SETTINGS, QUIET)
    assert len(repeated) == len(ran)


def test_cells_of_another_recipe_in_the_folder_are_refused(folder: Path, ran: dict[tuple[str, int], Path]) -> None:
    with pytest.raises(ConfigError, match="another recipe: stages.s differ"):
        run_cells(read_grid(write_grid(folder, steps={"s": 6})), folder / "out", SETTINGS, QUIET)


def test_no_run_is_begun_after_the_time_is_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "run_cell", lambda *_: pytest.fail("a run was begun"))
    with pytest.raises(UnfinishedError, match="0 of 8 runs done") as stop:
        run_cells(read_grid(folder / "grid.yaml"), folder / "out", Settings(4, "cpu", 1e-12, 0), QUIET)
    assert stop.value.exit_code == 75


def test_the_table_has_means_over_seeds_and_paired_differences_from_the_baseline(
    folder: Path, ran: dict[tuple[str, int], Path]
) -> None:
    table = tabulate(read_grid(folder / "grid.yaml"), ran, seed=0)
    figures = {figure.cell: figure for figure in table.figures}
    base, better = figures["encoder=a+connector=mlp"], figures["encoder=b+connector=mlp"]
    assert (base.value, base.n, base.seeds, base.blind, base.verdict) == (0.5, 40, 2, 0.25, "")
    assert (better.value, better.verdict) == (0.9, "better")
    assert better.difference == pytest.approx(0.4)
    assert base.low is not None
    assert base.high is not None
    assert base.low < 0.5 < base.high
    assert figures["encoder=a+connector=ldp"].verdict == "not distinguishable"
    assert table.seconds["encoder=a+connector=mlp"] == 3.0


def test_the_table_is_written_for_programs_and_for_people(folder: Path, ran: dict[tuple[str, int], Path]) -> None:
    table = tabulate(read_grid(folder / "grid.yaml"), ran, seed=0)
    files = {file.suffix: file for file in write_ablation(table, folder / "out")}
    assert json.loads(files[".json"].read_text())["format"] == "distill-ablation/1"
    rows = list(csv.DictReader(files[".csv"].open()))
    assert [row["connector"] for row in rows] == ["mlp", "ldp", "mlp", "ldp"]
    assert float(rows[2]["difference"]) == pytest.approx(0.4)
    assert "| encoder=b+connector=mlp | count | 40 | 25.0 |" in markdown(table)


def test_the_table_is_read_again_and_stands_in_the_report_of_the_run_it_lies_in(
    folder: Path, ran: dict[tuple[str, int], Path]
) -> None:
    table = tabulate(read_grid(folder / "grid.yaml"), ran, seed=0)
    assert vlm_section(folder).over_seeds == []
    (folder / "vlm" / "seeds").mkdir(parents=True)
    write_ablation(table, folder / "vlm" / "seeds")
    assert read_ablation(folder / "vlm" / "seeds" / "ablation.json") == table
    (shown,) = vlm_section(folder).over_seeds
    (row,) = shown.rows
    assert (shown.name, row.title, row.n, row.chance) == ("seeds", "VLM: count (%)", 40, "25.0")
    assert row.cells["encoder=a+connector=mlp"][::3] == ("50.0", "baseline")
    value, interval, change, verdict = row.cells["encoder=b+connector=mlp"]
    assert (value, verdict) == ("90.0", "better")
    assert interval.endswith("± 0.0")
    assert change.startswith("+40.0 points [")
    page = render(Page([RunFacts("mine", [], vlms=vlm_section(folder))]))
    section = page[page.index('id="vlms"') :]
    assert "encoder=b+connector=mlp" in section
    assert "+40.0 points" in section


def test_a_damaged_table_is_told_in_the_report(folder: Path) -> None:
    file = folder / "vlm" / "seeds" / "ablation.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"format": "other"}')
    assert "no table of `distill ablate`" in vlm_section(folder).absent


def test_popes_f1_is_no_mean_over_questions_and_stays_out_of_the_table(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    lines = [{"id": f"q{n}", "kind": "random", "metric": "pope", "conversations": turns} for n in range(10)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = {"encoder": {"a": {"vision": {"path": "a"}}}}
    grid = read_grid(write_grid(folder, axes=axes))
    runs = {("encoder=a", seed): tmp_path / "out" / str(seed) for seed in grid.seeds}
    for (_, seed), run in runs.items():
        answer_cell({**grid.cells[0].content, "seed": seed, "run_dir": str(run)}, grid.questions, SETTINGS, QUIET)
        assert "vlm_random_f1" in (run / "probe.json").read_text()
    assert [figure.metric for figure in tabulate(grid, runs, seed=0).figures] == ["vlm_random"]


def test_seeds_that_disagree_widen_the_interval_of_the_difference(folder: Path, tmp_path: Path) -> None:
    grid = read_grid(write_grid(folder, axes={"encoder": {"a": {"vision": {"path": "a"}}, "b": {}}}))
    runs = {(cell.name, seed): tmp_path / "out" / f"{cell.name}-{seed}" for cell in grid.cells for seed in grid.seeds}
    # Of 40 questions the baseline answers 20 with either seed, the other 38 with the first and 18 with the second.
    right = {("encoder=a", 0): 20, ("encoder=a", 1): 20, ("encoder=b", 0): 38, ("encoder=b", 1): 18}
    for (name, seed), run in runs.items():
        cell = next(cell for cell in grid.cells if cell.name == name)
        answer_cell({**cell.content, "seed": seed, "run_dir": str(run)}, grid.questions, SETTINGS, QUIET)
        answers = [Answer(q, "x", float(n < right[name, seed])) for n, q in enumerate(read_questions(grid.questions))]
        write_scores(answers, run / "probe.json", encoder=ENCODER, data=grid.questions, seed=0, settings={})
    other = next(figure for figure in tabulate(grid, runs, seed=0).figures if figure.cell == "encoder=b")
    assert other.difference == pytest.approx(0.2)
    assert other.difference_low is not None
    assert other.difference_low < 0
    assert other.verdict == "not distinguishable"
