"""Every small-VLM recipe parses, has its published numbers, and its toy overlay merges over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distill.cli import main
from distill.errors import ConfigError
from distill.vlm.connectors import build_connector
from distill.vlm.recipe import VLMRecipe, build_recipe, read_recipe
from distill.vlm.recipe_files import apply_flags, merge, read_yaml
from distill.vlm.templates import TEMPLATES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted((CONFIGS / "vlm").glob("*.yaml"))
TINY = sorted((CONFIGS / "vlm" / "tiny").glob("*.yaml"))
ABLATIONS = sorted((CONFIGS / "vlm" / "ablations").glob("*.yaml"))
CLIP_L_GRID = {336: (24, 24), 378: (27, 27), 448: (32, 32), 224: (16, 16)}
"""Patches of 14 px."""


def recipe(name: str) -> VLMRecipe:
    return build_recipe(read_yaml(CONFIGS / "vlm" / f"{name}.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_a_small_vlm_parses(file: Path) -> None:
    parsed = build_recipe(read_yaml(file))
    assert parsed.stages
    assert {stage.template or parsed.template for stage in parsed.stages.values()} <= set(TEMPLATES)


@pytest.mark.parametrize("file", RECIPES + TINY + ABLATIONS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_of_a_small_vlm_opens_with_purpose_hardware_time_command_and_expectation(file: Path) -> None:
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Purpose:", "Hardware:", "Time:", "Command:", "Expect:"):
        assert any(word in line for line in head), f"{file.name} lacks {word}"
    assert any(str(file.relative_to(CONFIGS.parent)) in line for line in head)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_has_a_toy_overlay_with_its_stages_and_none_of_its_data(file: Path) -> None:
    published, overlay = read_yaml(file), read_yaml(CONFIGS / "vlm" / "tiny" / file.name)
    parsed = build_recipe(merge(published, overlay))
    assert list(parsed.stages) == list(published["stages"])
    assert parsed.connector.name == published["connector"]["name"]
    for stage in parsed.stages.values():
        assert all(str(source.path).startswith("practice/") for source in stage.data.values())
        assert stage.steps is not None


@pytest.mark.parametrize(
    ("name", "tokens"), [("mini_internvl", 256), ("mobilevlm_v1", 144), ("mobilevlm_v2", 144), ("mm1", 144)]
)
def test_connectors_yield_the_published_number_of_tokens_for_a_tile(name: str, tokens: int) -> None:
    parsed = recipe(name)
    grid = CLIP_L_GRID[parsed.tiling.tile_size]
    assert build_connector(parsed.connector, 64, 32, grid).num_tokens(*grid) == tokens


def test_the_q_former_yields_thirty_two_tokens_through_two_projections() -> None:
    parsed = recipe("tinygptv")
    assert (parsed.connector.tokens, parsed.connector.bottleneck_width) == (32, 4096)


def test_stages_train_the_published_parts() -> None:
    trained = {
        name: [sorted(stage.lr) for stage in recipe(name).stages.values()]
        for name in ("mini_internvl", "mobilevlm_v1", "mobilevlm_v2", "mm1", "tinygptv")
    }
    everything = ["connector", "language", "vision"]
    assert trained == {
        "mini_internvl": [["connector"], everything],
        "mobilevlm_v1": [["connector"], ["connector", "language"]],
        "mobilevlm_v2": [["connector", "language"]] * 2,
        "mm1": [everything] * 2,
        "tinygptv": [["connector", "norms"], *[["connector", "language"]] * 3],
    }


def test_rates_batches_and_lengths_are_the_published_ones() -> None:
    v1, v2, mm1, tiny = (recipe(name).stages for name in ("mobilevlm_v1", "mobilevlm_v2", "mm1", "tinygptv"))
    assert [(stage.global_batch_size, max(stage.rates.values())) for stage in v1.values()] == [(256, 1e-3), (128, 2e-5)]
    assert [(stage.global_batch_size, max(stage.rates.values())) for stage in v2.values()] == [(256, 1e-3), (128, 4e-5)]
    assert (mm1["pretrain"].steps, mm1["pretrain"].global_batch_size) == (200_000, 512)
    assert [source.weight for source in mm1["pretrain"].data.values()] == [0.45, 0.45, 0.10]
    assert [stage.steps for stage in tiny.values()] == [5000, 20_000, 1000, 50_000]
    assert [max(stage.rates.values()) for stage in tiny.values()] == [1e-4, 1e-4, 3e-5, 1e-5]
    lora = recipe("tinygptv").language
    assert (lora.tune, lora.lora_rank, lora.lora_alpha, lora.qk_norm, lora.post_norm) == ("lora", 64, 16, True, True)


def test_flags_win_over_files_and_later_files_over_earlier_ones() -> None:
    words = [f"--config={CONFIGS}/vlm/mobilevlm_v1.yaml", f"--config={CONFIGS}/vlm/tiny/mobilevlm_v1.yaml"]
    parsed, content = read_recipe([*words, "--stages.tune.steps=7", "--vision.path=here"])
    assert (parsed.stages["tune"].steps, str(parsed.vision.path)) == (7, "here")
    assert parsed.tiling.tile_size == 64
    assert content["stages"]["tune"]["steps"] == 7


def test_an_overlay_takes_a_stage_away_by_null() -> None:
    content = apply_flags(read_yaml(CONFIGS / "vlm" / "mm1.yaml"), ["--stages.pretrain=null"])
    assert list(build_recipe(content).stages) == ["tune"]


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--stages.tune.steps=0", "steps"),
        ("--stages.tune.lr={connector: 0}", "finite rate above 0"),
        ("--stages.tune.warmup_fraction=2", "from 0 to 1"),
        ("--stages.tune.micro_batch_size=7", "no multiple"),
        ("--stages.tune.stepps=3", "stepps"),
        ("--connector.name=ldp3", "ldp3"),
        ("--stages.tune.lr={nose: 1.0}", "nose"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_name(flag: str, told: str) -> None:
    content = read_yaml(CONFIGS / "vlm" / "mobilevlm_v1.yaml")
    with pytest.raises(ConfigError, match=told):
        build_recipe(apply_flags(content, [flag]))


def test_a_recipe_without_a_file_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["vlm", "fit", "--vision.path", "here"])
    assert stop.value.code == 1
    assert "--config FILE" in capsys.readouterr().err


def test_every_ablation_names_recipes_that_are_there() -> None:
    for file in ABLATIONS:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert all((CONFIGS.parent / name).is_file() for name in content["recipe"])
