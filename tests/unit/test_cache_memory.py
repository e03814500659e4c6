from __future__ import annotations

import copy

import torch

from distill.cache.memory import HiddenStateMemory, States

IMAGES = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)


class Teacher:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, images: torch.Tensor) -> States:
        self.seen += [int(image.flatten()[0]) for image in images]
        prefix = images[:, :1, 0, :1].bfloat16()
        return {
            "t": [(prefix, images[:, None, None, 0, 0].bfloat16() * 2), (prefix + 1, images[:, :1, :, :].bfloat16())]
        }


def test_an_image_seen_again_is_not_computed_again_and_comes_back_equal() -> None:
    memory, teacher = HiddenStateMemory(10_000), Teacher()
    first = memory.fetch("train", torch.tensor([0, 1]), IMAGES[:2], teacher)
    mixed = memory.fetch("train", torch.tensor([2, 1, 0]), IMAGES[[2, 1, 0]], teacher)
    assert teacher.seen == [0, 1, 2]
    direct = Teacher()(IMAGES[[2, 1, 0]])
    for ours, theirs in zip(mixed["t"], direct["t"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert torch.equal(first["t"][0][1][1], mixed["t"][0][1][1])


def test_training_and_validation_rows_are_told_apart() -> None:
    memory, teacher = HiddenStateMemory(10_000), Teacher()
    memory.fetch("train", torch.tensor([0]), IMAGES[:1], teacher)
    memory.fetch("val", torch.tensor([0]), IMAGES[3:], teacher)
    assert teacher.seen == [0, 3]


def test_a_limit_of_zero_keeps_nothing() -> None:
    memory, teacher = HiddenStateMemory(0), Teacher()
    memory.fetch("train", torch.tensor([0]), IMAGES[:1], teacher)
    memory.fetch("train", torch.tensor([0]), IMAGES[:1], teacher)
    assert teacher.seen == [0, 0]
    assert len(memory) == 0


def test_the_limit_holds_and_the_rest_is_computed() -> None:
    memory, teacher = HiddenStateMemory(30), Teacher()
    for _ in range(2):
        memory.fetch("train", torch.tensor([0, 1, 2]), IMAGES[:3], teacher)
    assert memory.used_bytes <= 30
    assert len(memory) == 1
    assert teacher.seen == [0, 1, 2, 1, 2]


def test_a_copied_module_shares_its_memory() -> None:
    memory = HiddenStateMemory(10)
    assert copy.deepcopy(memory) is memory
