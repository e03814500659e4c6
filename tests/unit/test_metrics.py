from __future__ import annotations

import pytest
import torch

from distill.metrics import DomainCosine

DOMAIN = torch.tensor([0, 0, 1, 1])


def teacher_tokens() -> torch.Tensor:
    return torch.randn(4, 6, 8) + 3 * torch.ones(8)


def test_the_teacher_itself_has_cosine_and_skill_one() -> None:
    metric = DomainCosine(["a", "b"], 8)
    tokens = teacher_tokens()
    metric.update(2 * tokens, tokens, DOMAIN)
    for values in metric.compute().values():
        assert values["cosine"].item() == pytest.approx(1, abs=1e-5)
        assert values["skill"].item() == pytest.approx(1, abs=1e-4)


def test_no_constant_has_more_skill_than_the_mean_direction_which_has_none() -> None:
    metric = DomainCosine(["a"], 8)
    tokens = teacher_tokens() * torch.logspace(-1, 2, 24).reshape(4, 6, 1)  # a few tokens far larger than the rest
    constant = torch.nn.functional.normalize(tokens, dim=-1).mean((0, 1)).expand_as(tokens)
    other = DomainCosine(["a"], 8)
    other.update(tokens.mean((0, 1)).expand_as(tokens), tokens, torch.zeros(4, dtype=torch.int64))
    assert other.compute()["a"]["skill"] < 0
    metric.update(constant, tokens, torch.zeros(4, dtype=torch.int64))
    values = metric.compute()["a"]
    assert values["cosine"].item() > 0.8  # a raw cosine flatters
    assert values["cosine"].item() == pytest.approx(values["baseline"].item(), abs=1e-5)
    assert values["skill"].item() == pytest.approx(0, abs=1e-4)


def test_batches_add_up_to_the_whole() -> None:
    student, teacher = torch.randn(4, 6, 8), teacher_tokens()
    whole, parts = DomainCosine(["a", "b"], 8), DomainCosine(["a", "b"], 8)
    whole.update(student, teacher, DOMAIN)
    for i in range(4):
        parts.update(student[i : i + 1], teacher[i : i + 1], DOMAIN[i : i + 1])
    for domain in ("a", "b"):
        for key, value in whole.compute()[domain].items():
            assert parts.compute()[domain][key].item() == pytest.approx(value.item(), abs=1e-5)


def test_a_domain_without_images_is_left_out() -> None:
    metric = DomainCosine(["a", "b", "c"], 8)
    metric.update(teacher_tokens(), teacher_tokens(), DOMAIN)
    assert set(metric.compute()) == {"a", "b"}
