"""Each small-VLM recipe trains from end to end at toy size around an encoder that this project exported.

What is claimed of each: the loss falls; held-out questions on words, charts and counts are answered above chance by
more than the interval; and without the encoder's features nothing of that is left.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import training_cli
from distill.cli import main
from distill.export.run import export
from distill.probe.compare import compare_contenders
from distill.probe.contenders import read_contenders
from distill.vlm.practice import write_practice
from distill.vlm.runs import VLMRun
from distill.vlm.stages.run import read_losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "vlm"
RECIPES = ("mini_internvl", "mobilevlm_v1", "mobilevlm_v2", "mm1", "tinygptv")
STUDENT = "--model.students.vit.init_args"
CLAIMED = ("vlm_word", "vlm_chart_type", "vlm_chart_value", "vlm_count")
NUM_TRAIN, NUM_HELD_OUT = 1200, 120
SEED = 2
"""Of the practice data: the overlays' settings were chosen on seeds 0 and 1."""


@pytest.fixture(scope="module")
def folder(demo_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a distilled student of 64 px and patches of 8, its export, and practice data; one stands in it."""
    path = tmp_path_factory.mktemp("vlm_recipes")
    overrides = ["--trainer.max_epochs=2", f"{STUDENT}.patch_size=8", f"{STUDENT}.embed_dim=96", f"{STUDENT}.depth=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])  # the training CLI warns of words that it does not read
        training_cli.run(demo_recipe.words(path / "student", *overrides))
    export(path / "student", format="timm")
    languages = ("llama", "qwen2", "phi")
    write_practice(
        path / "practice", train=NUM_TRAIN, heldout=NUM_HELD_OUT, img_size_px=64, seed=SEED, language=languages
    )
    before = Path.cwd()
    os.chdir(path)
    try:
        yield path
    finally:
        os.chdir(before)


def fit(name: str, run: Path, *flags: str) -> VLMRun:
    configs = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(CONFIGS / "tiny" / f"{name}.yaml")]
    quiet = ["--trainer.progress=false", "--run_dir", str(run)]
    main(["vlm", "fit", *configs, "--vision.path", "student/exports/timm", *quiet, *flags])
    return VLMRun(run)


def score(run: Path, *flags: str) -> dict[str, dict[str, float]]:
    """Return value, low, high and chance of each figure."""
    main(["vlm", "score", str(run), "--data", "practice/heldout.jsonl", *flags])
    file = (run / "noise" if "--noise" in flags else run) / "probe.json"
    content = json.loads(file.read_text())
    entries = content["encoders"][0]["scores"]
    return {entry["metric"]: {**entry, "chance": content["metrics"][entry["metric"]]["blind"]} for entry in entries}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_to_answer_from_the_features_of_an_exported_encoder(folder: Path, name: str) -> None:
    run = fit(name, folder / "vlm" / name)

    losses = read_losses(run.final_stage())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20]), "the loss falls"

    seen, unseen = score(run.path), score(run.path, "--noise", "true")
    for metric in CLAIMED:
        assert seen[metric]["low"] > seen[metric]["chance"], f"{metric} is above chance by more than its interval"
        assert unseen[metric]["low"] <= unseen[metric]["chance"], f"{metric} without the features is not"

    contenders = read_contenders([run.path / "noise", run.path], "all")
    verdicts = {figure.metric: figure.verdict for figure in compare_contenders(contenders).figures}
    assert {verdicts[metric] for metric in CLAIMED} == {"better"}, "each difference leaves out zero"


def test_training_on_noise_in_place_of_features_teaches_nothing_but_the_questions(folder: Path) -> None:
    run = fit("mobilevlm_v2", folder / "vlm" / "blind", "--noise_features", "true", "--stages.tune.steps", "60")
    for figure in score(run.path).values():
        assert figure["low"] <= figure["chance"]
