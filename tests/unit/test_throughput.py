"""What training logs of its speed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.callbacks.throughput import Throughput, find_ceiling, is_compiled
from distill.errors import ConfigError

IMAGES = 4
PRODUCT = 2 * IMAGES * 8 * 8


class Module(nn.Module):
    """A stand-in for the task: what it logs is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.students = nn.ModuleDict({"s": nn.Linear(8, 8)})
        self.students["s"].forward_hidden_states = lambda images: [(images[:0], self.students["s"](images))]
        self.logged: dict[str, float] = {}
        self.device = torch.device("cpu")

    def log(self, name: str, value: Any, **settings: Any) -> None:
        self.logged[name] = float(value)


def trainer(world_size: int = 1) -> Any:
    return SimpleNamespace(world_size=world_size, is_global_zero=True, precision="32-true")


def run_batch(callback: Throughput, module: Module, batch_idx: int, world_size: int = 1, steps: int = 1) -> None:
    batch: dict[str, Tensor] = {"images": torch.ones(IMAGES, 8)}
    owner: Any = module
    callback.on_train_batch_start(trainer(world_size), owner, batch, batch_idx)
    for _ in range(steps):
        loss = module.students["s"].forward_hidden_states(batch["images"])[0][1].sum()
    callback.on_before_backward(trainer(world_size), owner, loss)
    loss.backward()
    callback.on_after_backward(trainer(world_size), owner)
    callback.on_train_batch_end(trainer(world_size), owner, None, batch, batch_idx)


def test_tflops_and_mfu_follow_from_the_counted_step() -> None:
    callback, module = Throughput(every_n_steps=1, ceiling_tflops=2.0), Module()
    run_batch(callback, module, 0)
    logged = module.logged
    # forward, and the gradient of the weight: images need none
    expected = logged["throughput/images_per_s"] * 2 * PRODUCT / IMAGES / 1e12
    assert logged["throughput/tflops"] == pytest.approx(expected)
    assert logged["throughput/mfu"] == pytest.approx(expected / 2.0)


def test_tflops_are_of_one_device_and_images_of_all() -> None:
    callback, module = Throughput(every_n_steps=1, ceiling_tflops=2.0), Module()
    run_batch(callback, module, 0, world_size=8)
    expected = module.logged["throughput/images_per_s"] / 8 * 2 * PRODUCT / IMAGES / 1e12
    assert module.logged["throughput/tflops"] == pytest.approx(expected)


def test_operations_are_counted_in_one_batch_of_an_epoch_only() -> None:
    callback, module = Throughput(every_n_steps=1, ceiling_tflops=2.0), Module()
    run_batch(callback, module, 0)
    first = module.logged["throughput/tflops"] / module.logged["throughput/images_per_s"]
    run_batch(callback, module, 1, steps=3)
    second = module.logged["throughput/tflops"] / module.logged["throughput/images_per_s"]
    assert second == pytest.approx(first)
    run_batch(callback, module, 0, steps=3)
    third = module.logged["throughput/tflops"] / module.logged["throughput/images_per_s"]
    assert third > 1.5 * first


def test_a_given_figure_is_taken_instead_of_counting() -> None:
    callback, module = Throughput(every_n_steps=1, ceiling_tflops=10.0, tflop_per_image=3.0), Module()
    run_batch(callback, module, 0)
    assert module.logged["throughput/tflops"] == pytest.approx(3 * module.logged["throughput/images_per_s"])


def test_compiled_encoders_are_left_to_the_compiler() -> None:
    module = Module()
    module.students["s"]._compiled_call_impl = module.students["s"].forward
    assert is_compiled(module.students["s"])
    callback = Throughput(every_n_steps=1, ceiling_tflops=2.0)
    run_batch(callback, module, 0)
    assert "throughput/images_per_s" in module.logged
    assert "throughput/mfu" not in module.logged


def test_an_exception_within_the_counted_batch_leaves_nothing_behind() -> None:
    callback, module = Throughput(ceiling_tflops=2.0), Module()
    owner: Any = module
    watched = module.students["s"].forward_hidden_states
    callback.on_train_batch_start(trainer(), owner, {}, 0)
    assert module.students["s"].forward_hidden_states is not watched
    callback.on_exception(trainer(), owner, RuntimeError())
    assert module.students["s"].forward_hidden_states is watched
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_cpu_is_compared_with_its_own_matrix_products() -> None:
    callback, module = Throughput(), Module()
    owner: Any = module
    callback.on_train_start(trainer(), owner)
    assert callback.ceiling_tflops is not None
    assert 0 < callback.ceiling_tflops < 1000


def test_a_known_gpu_is_compared_with_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert find_ceiling(torch.device("cuda"), torch.bfloat16) == 989.5


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_ceiling_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="Throughput.ceiling_tflops"):
        Throughput(ceiling_tflops=value)
