from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from distill.errors import ConfigError
from distill.optim import OptimConfig, build_optimizer, build_scheduler, parameter_groups, warmup_cosine


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4).requires_grad_(False)


def test_every_trainable_parameter_is_in_exactly_one_group_and_frozen_ones_in_none() -> None:
    student, heads = Student(), nn.Linear(4, 8)
    groups = parameter_groups(student, heads, OptimConfig())
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for m in (student, heads) for p in m.parameters() if p.requires_grad)


def test_a_run_that_would_train_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing is left to train"):
        parameter_groups(Student().requires_grad_(False), nn.Identity(), OptimConfig())


def test_only_matrices_decay() -> None:
    groups = {group["name"]: group for group in parameter_groups(Student(), nn.Linear(4, 8), OptimConfig())}
    assert [tuple(p.shape) for p in groups["student"]["params"]] == [(4, 4)]
    assert {tuple(p.shape) for p in groups["student_no_decay"]["params"]} == {(1, 5, 4), (1, 1, 4), (4,)}
    assert groups["student_no_decay"]["weight_decay"] == 0
    assert groups["heads"]["lr"] == OptimConfig().lr_heads


def test_the_schedule_rises_to_the_peak_and_falls_to_the_final_fraction() -> None:
    factor = warmup_cosine(100, OptimConfig(warmup_fraction=0.1, final_fraction=0.02))
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[10] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_scheduler_and_optimizer_step_together() -> None:
    config = OptimConfig(warmup_fraction=0.5)
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(parameter_groups(module, nn.Identity(), config), config)
    scheduler = build_scheduler(optimizer, 4, config)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(config.lr_student)


@pytest.mark.parametrize("wrong", [{"lr_student": -1.0}, {"warmup_fraction": 1.5}, {"lr_heads": float("nan")}])
def test_a_wrong_value_is_refused_by_its_key(wrong) -> None:
    with pytest.raises(ConfigError, match=rf"model\.optimizer\.{next(iter(wrong))}"):
        OptimConfig(**wrong)
