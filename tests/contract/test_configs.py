"""Every recipe parses and builds, without a weight file, and says at its head what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
HEADLINE = CONFIGS / "internvit_6b_to_300m.yaml"

pytestmark = pytest.mark.filterwarnings("ignore")


def dry_run(capsys: pytest.CaptureFixture[str], *files: Path) -> str:
    configs = [word for file in files for word in ("--config", str(file))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, "--dry_run", "true"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_builds_without_weights(file: Path, capsys) -> None:
    out = dry_run(capsys, file)
    assert "teacher" in out
    assert "student" in out


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_every_overlay_merges_over_the_headline_recipe(file: Path, capsys) -> None:
    assert "5,536,496,000" in dry_run(capsys, HEADLINE, file)


def test_the_headline_recipe_has_exactly_the_published_sizes(capsys) -> None:
    out = dry_run(capsys, HEADLINE)
    assert "5,536,496,000" in out
    assert "304,012,288" in out


@pytest.mark.parametrize("file", RECIPES + OVERLAYS, ids=lambda file: file.stem)
def test_every_recipe_opens_with_purpose_hardware_time_command_and_expectation(file: Path) -> None:
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Purpose:", "Hardware:", "Time:", "Command:", "Expect:"):
        assert any(word in line for line in head), f"{file.name} lacks {word}"
    assert any(f"configs/{file.relative_to(CONFIGS)}" in line for line in head if "Command" in line)


def test_a_later_config_wins_over_an_earlier_one(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(HEADLINE), "--config", str(OVERLAYS[0]), "--print_config"])
    printed = capsys.readouterr().out
    assert "global_batch_size: 64" in printed
    assert "max_steps: 16000" in printed
    assert "architecture: InternViT-6B-448px-V1-5" in printed
