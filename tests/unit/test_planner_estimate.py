"""Batches that fit, hours, disk, and the words of a command line that are a recipe's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from distill.accelerators import find_accelerator, measured_tflops, recognise_accelerator
from distill.errors import ConfigError
from distill.planner.disk import cache_bytes_per_image, checkpoint_bytes
from distill.planner.estimate import BatchLine
from distill.planner.simulate import StepCost
from distill.planner.speed import sheet_speed
from distill.planner.verb import check_flags
from distill.recipe_words import gather_overrides

MIB = 2**20


def cost(batch_size: int, teacher: int = 0) -> StepCost:
    """A step of 10 MiB weights, 3 MiB an image in the forward and 2 in the backward phase."""
    memory = {
        "teacher": Counter({"weights": 10 * MIB, "teacher workspace": teacher}),
        "forward": Counter({"weights": 10 * MIB, "student activations": 3 * MIB * batch_size}),
        "backward": Counter({"weights": 10 * MIB, "student activations": 2 * MIB * batch_size}),
    }
    flops = Counter({("teacher t", "forward"): 8 * batch_size * 10**12, ("student s", "forward"): batch_size * 10**12})
    return StepCost(batch_size, flops, memory, Counter(), {"t": 100})


def test_memory_is_a_line_over_the_batch_size() -> None:
    line = BatchLine(cost(2), cost(4), {"optimiser": 20 * MIB})
    phase, parts = line.peak(10)
    assert phase == "forward"
    assert parts.total() == (10 + 20 + 30) * MIB


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    line = BatchLine(cost(2), cost(4), {"optimiser": 20 * MIB})
    largest = line.largest(100 * MIB, step=1)
    assert line.peak(largest)[1].total() <= 100 * MIB < line.peak(largest + 1)[1].total()
    assert line.largest(100 * MIB, step=8) == 16


def test_no_batch_fits_where_one_image_is_too_much() -> None:
    assert BatchLine(cost(2), cost(4), {}).largest(12 * MIB, step=1) == 0


def test_a_teacher_that_needs_most_decides() -> None:
    assert BatchLine(cost(2, teacher=99 * MIB), cost(4, teacher=99 * MIB), {}).peak(4)[0] == "teacher"


def test_speed_from_a_data_sheet_is_arithmetic() -> None:
    sheet = find_accelerator("a100")
    speed = sheet_speed(cost(2), sheet, 0.5, 0.25, is_float32=False)
    assert speed.images_per_s == pytest.approx(312 / (8 / 0.5 + 1 / 0.25))
    assert not speed.is_measured
    slower = sheet_speed(cost(2), sheet, 0.5, 0.25, is_float32=True)
    assert slower.images_per_s == pytest.approx(speed.images_per_s / 2)


def test_an_unknown_accelerator_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"--accelerator 'v9' is not known; choose from .*h200"):
        find_accelerator("v9")


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.6, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA H100 PCIe", 79.6, None),
        ("Tesla T4", 15.0, None),
    ],
)
def test_a_device_is_recognised_by_its_driver_name(name: str, memory_gib: float, expected: str | None) -> None:
    found = recognise_accelerator(name, memory_gib)
    assert (found and found.name) == expected


def test_matrix_products_have_a_rate() -> None:
    assert 0 < measured_tflops(torch.device("cpu"), torch.float32, side=64) < 1000


def test_cache_formats_follow_from_tokens_and_width() -> None:
    # 2 layers of 10 tokens, 1024 wide, in bfloat16
    sizes = cache_bytes_per_image({"t": 2 * 10 * 1024 * 2}, {"t": torch.bfloat16}, {"t": 1024})
    assert sizes == {
        "none": 40960,
        "fp16": 40960,
        "int8": 20 * (1024 + 4),
        "int8 PCA-512": 20 * (512 + 4),
        "int8 PCA-256": 20 * (256 + 4),
    }


def test_a_checkpoint_has_weights_two_moments_and_an_average_where_one_is_kept() -> None:
    assert checkpoint_bytes(100, 80, averages_weights=False) == 260
    assert checkpoint_bytes(100, 80, averages_weights=True) == 360


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"accelerator": "h200", "measure": True}, "both given"),
        ({"memory_gib": -1.0}, "--memory_gib is -1.0"),
        ({"samples": 0}, "--samples is 0"),
        ({"teacher_fraction": 1.5}, "--teacher_fraction is 1.5"),
    ],
)
def test_flags_without_meaning_are_refused(flags: dict[str, object], message: str) -> None:
    values: dict[str, object] = {
        "accelerator": None,
        "measure": False,
        "memory_gib": None,
        "price_per_hour": None,
        "samples": None,
        "teacher_fraction": 0.5,
        "student_fraction": 0.5,
    }
    with pytest.raises(ConfigError, match=message):
        check_flags(**{**values, **flags})


def test_a_recipes_flags_travel_in_a_list() -> None:
    words = ["a.yaml", "--trainer.devices", "1", "--accelerator", "h200", "--config", "b.yaml", "--data.seed=3"]
    assert gather_overrides(words) == [
        "a.yaml",
        "--accelerator",
        "h200",
        '--overrides=["--trainer.devices=1", "--config=b.yaml", "--data.seed=3"]',
    ]


def test_a_recipe_that_is_optional_goes_behind_its_flag() -> None:
    assert gather_overrides(["a.yaml", "--train", "false"], "--recipe_file=")[0] == "--recipe_file=a.yaml"
    assert gather_overrides(["--config=a.yaml"], "--recipe_file=") == ["--recipe_file=a.yaml"]
    assert gather_overrides(["--train", "false"], "--recipe_file=") == ["--train", "false"]


def test_a_first_config_is_the_recipe_where_none_stands_alone() -> None:
    assert gather_overrides(["--config", "a.yaml", "--config=b.yaml"]) == ["a.yaml", '--overrides=["--config=b.yaml"]']
