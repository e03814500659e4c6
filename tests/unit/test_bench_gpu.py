"""The GPU benchmark's own logic, at toy size on the CPU: what it would claim of a GPU follows from what it measured."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
pytestmark = pytest.mark.slow

WORDS = ["--small", "--device", "cpu", "--batches", "2", "--repeats", "1", "--skip", "compile"]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return import_module("gpu")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def figures(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("gpu") / "figures.json"
    returned = gpu.main([*WORDS, "--json", str(file)])
    assert json.loads(file.read_text()) == returned
    return returned


def test_every_case_has_its_figures(figures: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in figures["rows"]}
    assert rows.keys() == {
        "teacher forward",
        "student step",
        "whole step",
        "whole step, activation checkpointing",
        "whole step, two students",
        "step from cached states",
        "teacher forward, FP8",
        "whole step, FP8 teacher",
        "transformers loop",
    }
    assert all(row["images_per_s"] > 0 for row in rows.values())
    ceiling = figures["ceilings"]["matmul_tflops"]
    assert all(row["share"] == pytest.approx(row["tflops"] / ceiling) for row in rows.values())


def work(row: dict[str, Any]) -> float:
    return row["tflops"] / row["images_per_s"]


def test_operations_of_the_parts_add_up_and_checkpointing_counts_once(figures: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in figures["rows"]}
    whole = work(rows["whole step"])
    assert work(rows["teacher forward"]) + work(rows["student step"]) == pytest.approx(whole)
    assert work(rows["whole step, activation checkpointing"]) == pytest.approx(whole)
    assert work(rows["step from cached states"]) == pytest.approx(work(rows["student step"]))
    two = work(rows["whole step, two students"]) - whole
    assert two == pytest.approx(work(rows["student step"]))


def test_toy_figures_are_not_taken_for_those_of_a_gpu(figures: dict[str, Any]) -> None:
    assert not figures["is_full_size"]
    assert figures["fp8"] == "emulated"
    assert figures["check"]["passed"]
    assert 0.99 < figures["check"]["fp8_cosine"] < 1


def test_nothing_is_measured_where_results_are_wrong(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "mean_cosine", lambda *_: 0.9)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="differ from float32"):
        gpu.main(WORDS)


def test_a_case_that_does_not_fit_says_so_and_the_others_go_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = gpu.seconds

    def seconds(run: Any, device: torch.device, *, repeats: int) -> float:
        if getattr(getattr(run, "variant", None), "students", 1) == 2:
            raise torch.OutOfMemoryError("no")
        return own(run, device, repeats=1)

    monkeypatch.setattr(gpu, "seconds", seconds)
    rows = {row["name"]: row for row in gpu.main([*WORDS, "fp8", "transformers"])["rows"]}
    assert rows["whole step, two students"]["failed"] == "out of memory"
    assert rows["step from cached states"]["images_per_s"] > 0
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_script_says_how_to_try_it(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--small --device cpu"):
        gpu.main([])


def test_eight_bit_layers_are_near_the_layers_they_replace(gpu: ModuleType) -> None:
    fp8 = sys.modules["fp8"]
    torch.manual_seed(0)
    # Without biases, which would drown the small tokens.
    net = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 32, bias=False))
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 10).reshape(2, 5, 1)  # scales are a token's own
    expected = net(x).detach()
    assert fp8.use_float8(net, "emulated") == 2
    found = net(x).detach()
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    assert float(F.cosine_similarity(found, expected, dim=-1).min()) > 0.99
    assert not list(net.parameters())
    layer = nn.Linear(64, 32)
    eight = fp8.Float8Linear(layer, is_emulated=True)
    assert float(F.cosine_similarity(eight(x[1, 1:2]).detach(), layer(x[1, 1:2]).detach()).min()) > 0.99
