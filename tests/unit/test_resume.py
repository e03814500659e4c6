from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.callbacks.step_seed import StepSeed
from distill.resume import ResumeFrom, cut_metrics
from distill.weights_fingerprint import weights_fingerprint

LOG = "epoch,loss/total,lr,step,val/skill\n,,,0,0.1\n,0.9,,0,\n,,1.0,0,\n,0.8,,1,\n,,,1,0.2\n,0.7,,2,\n,,2.0,2,\n"


def cut(folder: Path, step: int, text: str = LOG, *, validation_is_due: bool = False) -> str:
    (folder / "metrics.csv").write_text(text)
    cut_metrics(folder, ResumeFrom(folder / "x.ckpt", step, validation_is_due))
    (closed,) = folder.glob("metrics-*.csv")
    text = closed.read_text()
    closed.unlink()
    assert not (folder / "metrics.csv").exists()
    return text


def test_steps_that_will_be_done_again_leave_the_log_and_no_others(tmp_path: Path) -> None:
    assert cut(tmp_path, 3) == LOG
    assert cut(tmp_path, 2).splitlines() == LOG.splitlines()[:6]
    assert cut(tmp_path, 1).splitlines() == LOG.splitlines()[:4]


def test_a_validation_that_will_be_done_again_leaves_the_log(tmp_path: Path) -> None:
    assert cut(tmp_path, 2, validation_is_due=True).splitlines() == LOG.splitlines()[:5]
    assert cut(tmp_path, 1, validation_is_due=True).splitlines() == LOG.splitlines()[:4]


def test_a_line_that_a_kill_has_cut_leaves_the_log(tmp_path: Path) -> None:
    assert cut(tmp_path, 3, LOG + ",0.6,,2") == LOG


def test_earlier_parts_of_the_log_are_cut_too_and_none_is_overwritten(tmp_path: Path) -> None:
    for name in ("metrics-1.csv", "metrics-3.csv", "metrics.csv"):
        (tmp_path / name).write_text(LOG)
    cut_metrics(tmp_path, ResumeFrom(tmp_path / "x.ckpt", 2, False))
    assert {file.name for file in tmp_path.iterdir()} == {"metrics-1.csv", "metrics-2.csv", "metrics-3.csv"}
    for file in tmp_path.iterdir():
        assert file.read_text().splitlines() == LOG.splitlines()[:6]


def trainer(step: int, batch: int = 0, rank: int = 0) -> Any:
    progress = SimpleNamespace(current=SimpleNamespace(processed=batch))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(
        global_step=step,
        global_rank=rank,
        world_size=2,
        accumulate_grad_batches=4,
        num_training_batches=99,
        fit_loop=loop,
    )


def drawn(callback: StepSeed, *place: int) -> tuple[float, float, float]:
    callback.on_train_batch_start(trainer(*place), None, None, 0)  # pyright: ignore[reportArgumentType]
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_random_numbers_depend_on_seed_step_batch_and_rank_and_on_nothing_before() -> None:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        places = [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1)]
        first = [drawn(StepSeed(3), *place) for place in places]
        torch.rand(17)
        assert [drawn(StepSeed(3), *place) for place in reversed(places)] == first[::-1]
        other = drawn(StepSeed(4), 7)
        numbers = [number for values in [*first, other] for number in values]
        assert len(set(numbers)) == len(numbers)
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def test_a_resumed_run_keeps_the_seed_of_its_checkpoint() -> None:
    resumed = StepSeed(5)
    resumed.load_state_dict(StepSeed(3).state_dict())
    assert resumed.seed == 3


def test_a_fingerprint_tells_weights_apart_and_not_dtypes() -> None:
    module = torch.nn.Linear(300, 40)
    fingerprint = weights_fingerprint(module)
    assert weights_fingerprint(module.to(torch.bfloat16).float()) == fingerprint
    with torch.no_grad():
        module.weight.mul_(1.1)
    assert weights_fingerprint(module) != fingerprint
    assert weights_fingerprint(torch.nn.Linear(40, 300)) != weights_fingerprint(torch.nn.Linear(300, 40))


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_fingerprint_takes_tensors_of_any_size(count: int) -> None:
    module = torch.nn.Module()
    module.register_buffer("values", torch.arange(count))
    assert len(weights_fingerprint(module)) == 64
