"""Every command of docs/vlm.md runs as printed, with fewer questions and steps, and leaves what the page speaks of."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import training_cli
from distill.cli import main
from distill.export.run import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "vlm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
STUDENT = "--model.students.vit.init_args"
CHEAPER = {
    "vlm practice": ["--train", "12", "--heldout", "10"],
    "vlm fit": ["--stages.align.steps", "2", "--stages.tune.steps", "12", "--trainer.progress", "false"],
    "vlm score": ["--device", "cpu"],
    "vlm latency": ["--device", "cpu", "--new_tokens", "4", "--repeats", "2"],
    "report": ["--images_per_domain", "0"],
}
"""Enough to see a command work; the figures of the page are those of tests/e2e/test_vlm_recipes.py."""


@pytest.fixture(scope="module")
def folder(demo_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a reader of the page stands in, after the page's commands."""
    path = tmp_path_factory.mktemp("vlm_page")
    (path / "configs").symlink_to(ROOT / "configs")
    overrides = ["--trainer.max_epochs=1", f"{STUDENT}.patch_size=8", f"{STUDENT}.embed_dim=48", f"{STUDENT}.depth=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])  # the training CLI warns of words that it does not read
        training_cli.run(demo_recipe.words(path / "runs" / "mine", *overrides))
    export(path / "runs" / "mine", format="timm")
    before = Path.cwd()
    os.chdir(path)
    try:
        for command in COMMANDS:
            run_command(command, path)
        yield path
    finally:
        os.chdir(before)


def run_command(command: str, folder: Path) -> None:
    program, *words = shlex.split(command)
    assert program == "distill"
    if words[0] == "ablate":
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        cheaper = folder / "cheaper.yaml"
        seeds = "seeds: [0, 1]" if words[1].endswith("encoder.yaml") else "seeds: [0]"
        cheaper.write_text(re.sub(r"tune: \d+}", "tune: 2}", re.sub(r"seeds: \[.*\]", seeds, text)))
        words[1] = str(cheaper)
    name = " ".join(words[:2]) if words[0] == "vlm" else words[0]
    main([*words, *CHEAPER.get(name, [])])


def test_three_commands_lead_from_an_export_to_a_scored_model() -> None:
    first = BLOCKS[0].splitlines()
    assert [shlex.split(line)[1:3] for line in first] == [["vlm", "practice"], ["vlm", "fit"], ["vlm", "score"]]
    assert "--vision.path runs/mine/exports/timm" in first[1]


def test_the_commands_leave_the_files_they_name(folder: Path) -> None:
    for name in (
        "practice/heldout.jsonl",
        "practice/language/phi/tokenizer.json",
        "runs/mine/vlm/student/config.yaml",
        "runs/mine/vlm/student/probe.json",
        "runs/mine/vlm/student/noise/probe.json",
        "runs/mine/vlm/initial/stages/2-tune/stage.json",
        "runs/mine/report.html",
        "runs/mine/vlm/seeds/ablation.md",
        "runs/mine/vlm-parts/language/model.safetensors",
        "runs/mine/vlm-parts/connector.safetensors",
        "runs/mine/vlm-parts/vlm.json",
        "runs/ablation/ablation.md",
    ):
        assert (folder / name).stat().st_size > 0, name
    predictions = folder / "runs" / "mine" / "vlm" / "student" / "predictions"
    assert len(list(predictions.glob("vlmevalkit/*.json"))) == 1
    assert len(list(predictions.glob("lmms_eval/*/*_samples_heldout.jsonl"))) == 1


def test_the_report_compares_the_student_with_its_initialisation_inside_the_vlm(folder: Path) -> None:
    page = (folder / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    section = page[page.index('id="vlms"') :]
    section = section[: section.index("</section>")]
    assert "The baseline is initial." in section
    for title in ("VLM: all questions", "VLM: word", "VLM: chart type", "VLM: chart value", "VLM: count"):
        assert title in section
    assert re.search(r"better|worse|not distinguishable", section)
    assert "<th>chance</th>" in section
    assert "mean over seed(s) 0, 1" in section
    assert "<th>encoder=student</th>" in section


def test_scores_say_which_encoder_stands_inside(folder: Path) -> None:
    roles = {
        name: json.loads((folder / "runs" / "mine" / "vlm" / name / "probe.json").read_text())["encoders"][0]["role"]
        for name in ("student", "initial", "student/noise")
    }
    assert roles == {"student": "student", "initial": "initial", "student/noise": "other"}


def test_the_ablation_has_every_cell_of_its_grid(folder: Path) -> None:
    content = json.loads((folder / "runs" / "ablation" / "ablation.json").read_text())
    assert len(content["cells"]) == 4
    assert content["baseline"] == "encoder=initial+connector=ldpv2"
    assert {figure["n"] for figure in content["figures"] if figure["metric"] == "vlm_word"} == {10}
