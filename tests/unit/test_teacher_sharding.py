"""Which rows of a sharded teacher lie on which rank, and how ranks with unequal work stay together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill import teacher_sharding
from distill.teacher_sharding import Company
from teachers import InternViT, InternViTConfig

WORLD_SIZE = 4
# 34 and 65 are no multiples of 4: the last rank has fewer rows.
CONFIG = InternViTConfig(embed_dim=34, depth=2, num_heads=2, mlp_dim=65, img_size=28)


@pytest.fixture(params=range(WORLD_SIZE))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """Be one of four ranks, whose collectives do nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=WORLD_SIZE, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def whole_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    teacher = InternViT("random", CONFIG, dtype="float32", seed=4)
    teacher.load_weights()
    return {name: tensor.to(dtype) for name, tensor in teacher.state_dict().items()}


@pytest.mark.parametrize("weights", ["a file", "random"])
def test_each_rank_reads_its_rows_of_every_tensor(rank: int, weights: str, tmp_path: Path) -> None:
    whole = whole_weights()
    file = tmp_path / "model.safetensors"
    save_file(whole, file)
    teacher = InternViT("random" if weights == "random" else str(file), CONFIG, dtype="bfloat16", seed=4)
    teacher.shard(init_device_mesh("cpu", (WORLD_SIZE,)))
    teacher.load_weights()
    assert teacher.is_loaded
    for name, parameter in teacher.named_parameters():
        parts = whole[name].to(torch.bfloat16).chunk(WORLD_SIZE)
        expected = parts[rank] if rank < len(parts) else whole[name][:0].to(torch.bfloat16)
        assert torch.equal(parameter.to_local(), expected), name
        assert parameter.shape == whole[name].shape
        assert not parameter.requires_grad


def test_a_teacher_that_has_its_weights_cannot_be_sharded_any_more() -> None:
    teacher = InternViT("random", CONFIG, dtype="float32")
    teacher.load_weights()
    with pytest.raises(RuntimeError, match=r"call shard\(\) before load_weights\(\)"):
        teacher.shard(None)


class Meeting:
    """A control group of threads: `highest` waits for all of them."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.values: dict[int, int] = {}

    def highest(self, value: int) -> int:
        self.values[threading.get_ident()] = value
        self.barrier.wait(60)
        result = max(self.values.values())
        self.barrier.wait(60)
        return result


@pytest.mark.parametrize("wanted", [([1, 1, 1], [1]), ([], [1, 2, 1]), ([1, 1, 2, 2], [1, 2, 1, 2])])
def test_ranks_run_the_same_teachers_in_the_same_order_whatever_each_wants(
    monkeypatch: pytest.MonkeyPatch, wanted: tuple[list[int], list[int]]
) -> None:
    meeting = Meeting(2)
    monkeypatch.setattr(teacher_sharding, "control_group", lambda: meeting)
    ran: list[list[tuple[int, str]]] = [[], []]

    def work(number: int) -> None:
        company = Company(lambda teacher: ran[number].append((teacher, "for the others")))
        for teacher in wanted[number]:
            company.join(teacher)
            ran[number].append((teacher, "own"))
        company.leave()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [teacher for teacher, _ in ran[0]] == [teacher for teacher, _ in ran[1]]
    for number in range(2):
        assert [teacher for teacher, why in ran[number] if why == "own"] == wanted[number]
