"""`distill plan` and `distill doctor` on recipes of this project."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.training_cli import run

ROOT = Path(__file__).resolve().parents[2]
HEADLINE = ROOT / "configs" / "internvit_6b_to_300m.yaml"

pytestmark = pytest.mark.filterwarnings("ignore")


def planned(tmp_path: Path, *words: str) -> dict[str, Any]:
    target = tmp_path / "plan.json"
    main(["plan", *words, "--json", str(target)])
    return json.loads(target.read_text())


def test_a_plan_of_the_demo_has_every_part_and_its_arithmetic_is_right(demo_recipe, tmp_path: Path, capsys) -> None:
    words = demo_recipe.words(tmp_path / "run")[1:]
    flags = ["--accelerator", "a100", "--price_per_hour", "2", "--trainer.max_epochs=3"]
    plan = planned(tmp_path, *words, *flags)
    assert not (tmp_path / "run").exists(), "a plan begins no run"
    assert plan["parameters"].keys() == {"teacher efficientnet_lite0", "student vit", "heads"}
    assert plan["images"] == 3 * 4 * 24
    assert plan["hours"] == pytest.approx(plan["images"] / plan["speed"]["total_images_per_s"] / 3600)
    assert plan["cost"] == pytest.approx(2 * plan["device_hours"])
    assert plan["disk"]["shards"]["num_bytes"] == sum(
        file.stat().st_size for file in demo_recipe.images.glob("*/*.tar")
    )
    assert plan["memory"]["largest_batch"] > 100
    assert "hours of training" in capsys.readouterr().out


def test_a_measured_plan_takes_steps_here(demo_recipe, tmp_path: Path) -> None:
    words = demo_recipe.words(tmp_path / "run", "--trainer.precision=32-true")[1:]
    plan = planned(tmp_path, *words, "--measure", "true")
    assert plan["speed"]["is_measured"]
    assert plan["speed"]["images_per_s"] > 0
    assert plan["device"]["kind"] == "cpu"


def test_training_logs_the_operations_that_the_plan_told(demo_recipe, tmp_path: Path) -> None:
    words = demo_recipe.words(tmp_path / "run", "--trainer.precision=32-true", "--trainer.max_epochs=1")
    plan = planned(tmp_path, *words[1:], "--accelerator", "a100")
    run(words)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("throughput/mfu")]
    tflops, images_per_s, mfu = (float(rows[-1][f"throughput/{name}"]) for name in ("tflops", "images_per_s", "mfu"))
    told = sum(count for by in plan["flops_per_image"].values() for count in by.values()) / 1e12
    assert tflops / images_per_s == pytest.approx(told, rel=0.01)
    assert 0 < mfu < 2


@pytest.mark.slow
def test_the_headline_recipe_has_the_published_operations_and_fits_its_gpus(tmp_path: Path) -> None:
    plan = planned(tmp_path, str(HEADLINE), "--accelerator", "h100", "--price_per_hour", "2.5")
    flops = {part: sum(by.values()) for part, by in plan["flops_per_image"].items()}
    forward = plan["flops_per_image"]["student internvit_300m"]["forward"]
    assert flops["teacher internvit_6b"] == pytest.approx(11.95e12, rel=0.01)
    assert forward == pytest.approx(0.724e12, rel=0.01)
    assert plan["flops_per_image"]["student internvit_300m"]["recompute"] == pytest.approx(forward, rel=0.01)
    # bfloat16 weights of 5,536,496,000 parameters, by name
    weights = plan["memory"]["parts"]["weights of teacher internvit_6b"]
    assert weights == 2 * 5_536_496_000
    assert plan["memory"]["batch_size"] == 64
    assert plan["memory"]["largest_batch"] >= 64
    assert plan["images"] == 40_000 * 512
    assert plan["device_hours"] == pytest.approx(8 * plan["hours"])
    # three AdamW checkpoints of 304 M and the heads, in float32
    assert plan["disk"]["checkpoint_bytes"] == pytest.approx(3 * 4 * 317.1e6, rel=0.01)
    # 4 hidden states of 1025 tokens, 3200 wide, in bfloat16
    assert plan["disk"]["cache_bytes_per_image"]["none"] == 4 * 1025 * 3200 * 2


def test_a_recipe_that_does_not_exist_is_one_line_and_exit_1(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "no/such/recipe.yaml"])
    assert stop.value.code == 1
    assert "The recipe no/such/recipe.yaml does not exist" in capsys.readouterr().err


def test_the_doctor_looks_at_a_recipes_data_and_weights(demo_recipe, tmp_path: Path, capsys) -> None:
    words = demo_recipe.words(tmp_path / "run", "--trainer.precision=32-true")[1:]
    target = tmp_path / "verdicts.json"
    main(["doctor", *words, "--train", "false", "--json", str(target)])
    checks = {check["check"]: check for check in json.loads(target.read_text())["checks"]}
    assert "96 images" in checks["shards"]["found"]
    assert "fingerprint" in checks["shards"]["found"]
    assert "sha256" in checks["weights of teacher efficientnet_lite0"]["found"]
    assert checks["weights of student vit"]["status"] == "ok"
    assert "0 failed" in capsys.readouterr().out


def test_the_doctor_fails_on_a_damaged_shard_and_names_it(demo_recipe, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "natural-000000.tar").write_bytes(b"no tar at all" * 1000)
    words = demo_recipe.words(tmp_path / "run", f"--data.train={tmp_path / 'train'}", "--trainer.precision=32-true")[1:]
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *words, "--train", "false", "--json", str(tmp_path / "verdicts.json")])
    assert stop.value.code == 1
    failed = [c for c in json.loads((tmp_path / "verdicts.json").read_text())["checks"] if c["status"] == "failed"]
    assert [check["check"] for check in failed] == ["shards"]
    assert "natural-000000" in failed[0]["found"]
