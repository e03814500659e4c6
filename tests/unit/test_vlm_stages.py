"""Stages: what each trains and keeps, that a cut run goes on exactly, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from distill.checkpoint import read_checkpoint
from distill.errors import ConfigError, DataError, UnfinishedError, WeightsError
from distill.stop_signals import stop_signals
from distill.vlm.build import build_vlm, load_trained
from distill.vlm.mixture import MixtureDataset
from distill.vlm.planned_samples import PlannedSamples
from distill.vlm.practice import write_practice
from distill.vlm.recipe import StageConfig, build_recipe
from distill.vlm.recipe_files import merge
from distill.vlm.records import read_records
from distill.vlm.runs import VLMRun, load_kept, trained_state
from distill.vlm.stages.data import accumulated_batches, stage_steps
from distill.vlm.stages.run import read_losses, run_recipe
from distill.vlm.stages.task import VLMTask, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
QUIET = Console(quiet=True)
ENCODER = """\
class_path: students.InternViT
init_args: {weights: random, img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, init: mimetic}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Practice data of 32 px, toy language models, and an encoder."""
    path = tmp_path_factory.mktemp("vlm_stages")
    write_practice(path, train=6, heldout=2, img_size_px=32, seed=0, language=("llama", "phi"))
    (path / "encoder.yaml").write_text(ENCODER)
    return path


def content(folder: Path, run: Path, **overrides: Any) -> dict[str, Any]:
    """Return a recipe of two stages of four steps."""
    base: dict[str, Any] = {
        "run_dir": str(run),
        "vision": {"path": str(folder / "encoder.yaml"), "tune": "full"},
        "connector": {"name": "pixel_shuffle_mlp"},
        "language": {"path": str(folder / "language" / "llama"), "random_init": True},
        "tiling": {"tile_size": 32, "max_tiles": 1},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "progress": False, "checkpoint_every": 2},
        "stages": {
            "align": {
                "lr": {"connector": 1e-3},
                "data": {"captions": {"path": str(folder / "captions.jsonl"), "kind": "caption"}},
            },
            "tune": {
                "lr": {"connector": 1e-3, "language": 1e-3, "vision": 1e-4},
                "data": {"questions": {"path": str(folder / "train.jsonl")}},
            },
        },
    }
    for stage in base["stages"].values():
        stage.update(steps=4, global_batch_size=2, max_length=192)
    return merge(base, overrides)


def run(given: dict[str, Any], resume: str = "no") -> VLMRun:
    return run_recipe(build_recipe(given), given, resume=resume, console=QUIET)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VLMRun:
    """The two stages, run in one go."""
    return run(content(folder, tmp_path_factory.mktemp("finished")))


def state_of(run: VLMRun) -> dict[str, Tensor]:
    return read_checkpoint(run.final_stage() / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_stage_trains_the_parts_it_names_and_leaves_the_others(finished: VLMRun) -> None:
    first, second = finished.stage_dirs()
    before = build_vlm(finished.recipe())
    aligned = trained_state(first, before.fingerprints)
    tuned = trained_state(second, before.fingerprints)
    initial = before.model.state_dict()
    assert {key.split(".")[0] for key in aligned} == {"connector"}
    assert {key.split(".")[0] for key in tuned} == {"connector", "language", "vision"}
    assert not torch.equal(aligned["connector.mlp1.1.weight"], initial["connector.mlp1.1.weight"])
    changed = [key for key, value in tuned.items() if not torch.equal(value, initial[key])]
    assert any(key.startswith("vision.") for key in changed)


def test_each_part_has_its_own_rate_and_matrices_alone_decay(folder: Path, tmp_path: Path) -> None:
    recipe = build_recipe(content(folder, tmp_path, stages={"tune": {"weight_decay": 0.1}}))
    built = build_vlm(recipe)
    VLMTask(built.model, recipe.stages["tune"], "tune", tunable=built.tunable)
    groups = {group["name"]: group for group in parameter_groups(built.model, recipe.stages["tune"])}
    assert groups["vision"]["lr"] == 1e-4
    assert groups["language_no_decay"]["lr"] == 1e-3
    assert (groups["connector"]["weight_decay"], groups["connector_no_decay"]["weight_decay"]) == (0.1, 0.0)
    trained = sum(p.requires_grad for p in built.model.parameters())
    assert sum(len(group["params"]) for group in groups.values()) == trained


def test_a_part_that_a_stage_does_not_train_stays_in_eval_mode(folder: Path, tmp_path: Path) -> None:
    recipe = build_recipe(content(folder, tmp_path))
    built = build_vlm(recipe)
    task = VLMTask(built.model, recipe.stages["align"], "align", tunable=built.tunable).train()
    assert {key.split(".")[0] for key, p in task.model.named_parameters() if p.requires_grad} == {"connector"}
    assert task.model.connector.training
    assert not task.model.language.training
    assert not task.model.vision.training


def test_norms_can_be_trained_without_the_adapters(folder: Path, tmp_path: Path) -> None:
    language = {"path": str(folder / "language" / "phi"), "tune": "lora", "train_norms": True, "post_norm": True}
    stages = {"align": {"lr": {"norms": 1e-3}}, "tune": {"lr": {"vision": 1e-3}}}
    recipe = build_recipe(content(folder, tmp_path, language=language, stages=stages))
    built = build_vlm(recipe)
    trained = VLMTask(built.model, recipe.stages["align"], "align", tunable=built.tunable).kept
    language_names = [key for key in trained if key.startswith("language.")]
    assert language_names
    assert all("norm" in key for key in language_names)
    later = VLMTask(built.model, recipe.stages["tune"], "tune", tunable=built.tunable)
    assert any("lora_" in key for key in later.kept)


def test_a_stage_that_names_a_frozen_part_is_refused(folder: Path, tmp_path: Path) -> None:
    recipe = build_recipe(content(folder, tmp_path, vision={"tune": "frozen"}))
    built = build_vlm(recipe)
    with pytest.raises(ConfigError, match=r"stages\.tune\.lr names vision.*vision\.tune to full"):
        VLMTask(built.model, recipe.stages["tune"], "tune", tunable=built.tunable)


class KilledError(Exception):
    """What ends a process without asking."""


@pytest.mark.parametrize("steps_before", [3, 7], ids=["within the first stage", "within the second stage"])
def test_a_run_that_was_cut_goes_on_to_the_same_weights_bit_for_bit(
    folder: Path, finished: VLMRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    taken: list[int] = []
    step = VLMTask.training_step

    def cut(self: VLMTask, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if len(taken) == steps_before:
            raise KilledError
        taken.append(batch_idx)
        return step(self, batch, batch_idx)

    given = content(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(VLMTask, "training_step", cut)
        with pytest.raises(KilledError):
            run(given)
    went_on = run(given, resume="auto")
    expected, found = state_of(finished), state_of(went_on)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for mine, theirs in zip(went_on.stage_dirs(), finished.stage_dirs(), strict=True):
        assert read_losses(mine) == read_losses(theirs)


def test_a_run_that_is_told_to_stop_saves_says_so_and_goes_on(
    folder: Path, finished: VLMRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    step = VLMTask.training_step

    def told(self: VLMTask, batch: dict[str, Any], batch_idx: int) -> Tensor:
        taken.append(batch_idx)
        signals = stop_signals()
        assert signals is not None
        if len(taken) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        while len(taken) == 6 and not signals.exit_code:
            time.sleep(0.01)
        return step(self, batch, batch_idx)

    given = content(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(VLMTask, "training_step", told)
        with pytest.raises(UnfinishedError, match="Preempted by SIGTERM at step 2") as stop:
            run(given)
    assert stop.value.exit_code == 75
    expected, found = state_of(finished), state_of(run(given, resume="auto"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_finished_stage_is_not_run_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(folder, tmp_path / "run")
    before = run(given).stage_summaries()
    monkeypatch.setattr(VLMTask, "training_step", lambda *_: pytest.fail("a finished stage was trained"))
    again = run(given, resume="auto")
    assert again.stage_summaries() == before
    assert [entry["steps"] for entry in again.stage_summaries()] == [4, 4]


def test_a_new_run_in_the_same_folder_moves_the_earlier_one_aside(folder: Path, tmp_path: Path) -> None:
    given = content(folder, tmp_path / "run", stages={"tune": None})
    run(given)
    run(given)
    assert (tmp_path / "run" / "earlier-1" / "stages" / "1-align" / "stage.json").is_file()


def test_going_on_with_another_recipe_is_refused_naming_the_key(folder: Path, finished: VLMRun) -> None:
    given = content(folder, finished.path, seed=1)
    with pytest.raises(ConfigError, match="seed differ"):
        run(given, resume="auto")


def test_other_weights_under_the_encoders_path_are_refused(folder: Path, finished: VLMRun) -> None:
    with pytest.raises(WeightsError, match=r"other weights under vision\.path"):
        trained_state(finished.final_stage(), {"vision": "0" * 64})


def test_an_unfinished_run_is_not_scored(folder: Path, finished: VLMRun, tmp_path: Path) -> None:
    given = content(folder, tmp_path)
    VLMRun(tmp_path).begin(given, resume="no")
    with pytest.raises(ConfigError, match="stage 1-align has no"):
        load_trained(VLMRun(tmp_path))


def test_a_trained_model_comes_back_as_it_was_saved(finished: VLMRun) -> None:
    model = load_trained(finished).model
    saved = {key.removeprefix("model."): value for key, value in state_of(finished).items()}
    loaded = model.state_dict()
    assert not model.training
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="missing weight"):
        load_kept(model, {"bias": torch.zeros(2)}, frozenset({"weight", "bias"}), "here")
    with pytest.raises(WeightsError, match="left over bias"):
        load_kept(model, {"bias": torch.zeros(2)}, frozenset(), "here")


def test_every_stage_leaves_a_log_and_a_summary(finished: VLMRun) -> None:
    for stage in finished.stage_dirs():
        assert len(read_losses(stage)) == 4
        summary = json.loads((stage / "stage.json").read_text())
        assert summary["format"] == "distill-vlm-stage/1"
        assert summary["parameters"] > 0


def stage(**settings: Any) -> StageConfig:
    content: Mapping[str, Any] = {"lr": {"connector": 1.0}, "data": {"a": {"path": "a.jsonl"}}, **settings}
    given = {
        "run_dir": "r",
        "vision": {"path": "v"},
        "connector": {},
        "language": {"path": "l"},
        "stages": {"s": dict(content)},
    }
    return build_recipe(given).stages["s"]


def test_epochs_become_steps_rounded_up() -> None:
    assert stage_steps(stage(epochs=1.0, global_batch_size=8), 20) == 3
    assert stage_steps(stage(epochs=2.0, global_batch_size=8), 20) == 5
    assert stage_steps(stage(steps=7), 20) == 7
    with pytest.raises(ConfigError, match="no sample"):
        stage_steps(stage(), 0)


def test_a_batch_is_taken_in_micro_batches() -> None:
    assert accumulated_batches(stage(global_batch_size=12, micro_batch_size=4)) == 3
    assert accumulated_batches(stage(global_batch_size=12)) == 1


class Builder:
    """Refuses the records it is told to."""

    def __init__(self, bad: set[str]) -> None:
        self.bad = bad

    def build(self, conversation: Any) -> Any:
        if any(mark in conversation.id for mark in self.bad):
            raise DataError(f"{conversation.id} is damaged")
        return conversation


def test_a_bad_record_is_replaced_by_the_same_other_one_each_time(folder: Path, capsys: Any) -> None:
    mixture = MixtureDataset({"questions": read_records(folder / "train.jsonl", "instruction")})
    bad = {"(word-train-0-000000)"}
    samples = [PlannedSamples(mixture, Builder(bad)) for _ in range(2)]  # type: ignore[arg-type]
    found = [[own[place].id for place in range(len(mixture))] for own in samples]
    assert found[0] == found[1]
    assert not any("(word-train-0-000000)" in name for name in found[0])
    assert "replaced by another" in capsys.readouterr().err


def test_a_source_of_which_nothing_can_be_read_ends_the_run(folder: Path) -> None:
    mixture = MixtureDataset({"questions": read_records(folder / "train.jsonl", "instruction")})
    with pytest.raises(DataError, match="one after another"):
        PlannedSamples(mixture, Builder({"train"}))[0]  # type: ignore[arg-type]
