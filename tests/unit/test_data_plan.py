"""The plan is a pure function of data, seed, weights and place, and samplers share it out without loss or repeat."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from distill.data.index import DatasetIndex, build_index
from distill.data.plan import SamplePlan
from distill.data.samplers import EvenSampler, PlanSampler
from distill.errors import ConfigError

MakeIndex = Callable[..., DatasetIndex]


@pytest.fixture
def make_index(tmp_path: Path) -> MakeIndex:
    """Return a function that writes shards of given sizes, by domain, and indexes them."""

    def make(**counts: int) -> DatasetIndex:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2)).save(buffer, "PNG")
        for domain, count in counts.items():
            with wds.TarWriter(str(tmp_path / f"{domain}-0.tar")) as writer:
                for number in range(count):
                    writer.write({"__key__": f"{number:06d}", "png": buffer.getvalue()})
        return build_index(tmp_path)

    return make


def domains_of(index: DatasetIndex, rows: list[int]) -> Counter[str]:
    return Counter(index.domains[int(index.domain_ids[row])] for row in rows)


def test_domains_are_mixed_exactly_by_their_weights(make_index: MakeIndex) -> None:
    index = make_index(a=300, b=200, c=250, d=100)
    plan = SamplePlan(index, {"a": 0.5, "b": 0.25, "c": 0.15, "d": 0.1})
    rows = [plan[position] for position in range(400)]
    assert domains_of(index, rows) == {"a": 200, "b": 100, "c": 60, "d": 40}
    middle = domains_of(index, rows[113:213])
    assert all(abs(middle[name] - share) <= 2 for name, share in {"a": 50, "b": 25, "c": 15, "d": 10}.items())


def test_domains_without_weights_have_equal_shares(make_index: MakeIndex) -> None:
    index = make_index(a=90, b=7)
    plan = SamplePlan(index)
    assert domains_of(index, [plan[position] for position in range(40)]) == {"a": 20, "b": 20}


def test_an_epoch_of_one_domain_holds_each_sample_once_in_new_order(make_index: MakeIndex) -> None:
    plan = SamplePlan(make_index(a=60))
    epochs = [[plan[epoch * 60 + place] for place in range(60)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_a_domain_in_a_mix_repeats_only_when_it_is_used_up(make_index: MakeIndex) -> None:
    index = make_index(a=60, b=60)
    plan = SamplePlan(index, {"a": 3, "b": 1})
    rows = Counter(plan[position] for position in range(80))
    assert max(rows.values()) == 1


def test_places_can_be_asked_for_in_any_order_and_far_ahead(make_index: MakeIndex) -> None:
    index = make_index(a=70, b=50)
    plan = SamplePlan(index, seed=5)
    forward = [plan[position] for position in range(30)]
    other = SamplePlan(index, seed=5)
    assert [other[position] for position in reversed(range(30))] == forward[::-1]
    assert 0 <= plan[10**10] < len(index)


def test_seeds_give_different_plans(make_index: MakeIndex) -> None:
    index = make_index(a=100, b=100)
    plans = [[SamplePlan(index, seed=seed)[position] for position in range(40)] for seed in (0, 1, 2**32 - 1)]
    assert plans[0] != plans[1] != plans[2]


def test_the_order_of_the_weights_does_not_matter(make_index: MakeIndex) -> None:
    index = make_index(a=50, b=50)
    first, second = SamplePlan(index, {"a": 1, "b": 2}), SamplePlan(index, {"b": 2, "a": 1})
    assert [first[position] for position in range(40)] == [second[position] for position in range(40)]


@pytest.mark.slow
def test_a_plan_travels_to_another_process(make_index: MakeIndex) -> None:
    plan = SamplePlan(make_index(a=40), seed=3)
    expected = [plan[position] for position in range(20)]
    assert [pickle.loads(pickle.dumps(plan))[position] for position in range(20)] == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(plan.__getitem__, range(20)) == expected


def test_a_substitute_is_of_the_same_domain_and_always_the_same(make_index: MakeIndex) -> None:
    index = make_index(a=40, b=40)
    plan = SamplePlan(index, seed=3)
    chosen = [plan.substitute(position, 45, attempt) for position in range(20) for attempt in range(3)]
    assert all(row in index.rows_of("b") for row in chosen)
    assert len(set(chosen)) > 20
    assert chosen == [plan.substitute(position, 45, attempt) for position in range(20) for attempt in range(3)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "pages": 1}, "pages; the training data has a, b"),
        ({"a": 1}, "does not name b"),
        ({}, "does not name a, b"),
        ({"a": 0, "b": 1}, r"data\.weights\.a is 0"),
        ({"a": -1, "b": 1}, r"data\.weights\.a is -1"),
        ({"a": float("nan"), "b": 1}, r"data\.weights\.a is nan"),
        ({"a": float("inf"), "b": 1}, r"data\.weights\.a is inf"),
    ],
)
def test_weights_that_cannot_work_name_the_domains(
    make_index: MakeIndex, weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplePlan(make_index(a=2, b=2), weights)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_names_its_key(make_index: MakeIndex, seed: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.seed"):
        SamplePlan(make_index(a=2), seed=seed)


def test_a_negative_place_is_an_error(make_index: MakeIndex) -> None:
    with pytest.raises(IndexError, match="starts at 0"):
        SamplePlan(make_index(a=2))[-1]


def test_grain_is_imported_without_a_word(make_index: MakeIndex, tmp_path: Path) -> None:
    make_index(a=5)
    code = (
        "import sys; from distill.data.index import build_index; from distill.data.plan import SamplePlan;"
        "plan = SamplePlan(build_index(sys.argv[1]));"
        "assert not {'grain', 'torch', 'lightning'} & set(sys.modules); plan[0]"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def global_batches(world_size: int, **arguments: int) -> list[set[int]]:
    ranks = [list(PlanSampler(100, 12, rank=rank, world_size=world_size, **arguments)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    joined = []
    for parts in zip(*ranks, strict=True):
        positions = [position for part in parts for position in part]
        assert len(positions) == len(set(positions)) == 12
        joined.append(set(positions))
    return joined


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size: int) -> None:
    assert global_batches(world_size) == [set(range(12 * batch, 12 * batch + 12)) for batch in range(8)]


@pytest.mark.parametrize("done", [0, 1, 5])
def test_resuming_continues_the_uninterrupted_batches(done: int) -> None:
    whole = list(PlanSampler(240, 12, rank=1, world_size=2))
    resumed = list(PlanSampler(240, 12, rank=1, world_size=2, start=12 * done))
    assert resumed[: len(whole) - done] == whole[done:]


def test_a_sampler_knows_its_length() -> None:
    sampler = PlanSampler(100, 12, rank=0, world_size=4)
    assert len(sampler) == len(list(sampler)) == 8


@pytest.mark.parametrize(
    ("samples", "batch", "rank", "world_size", "message"),
    [
        (100, 10, 0, 4, "must be a multiple of 4"),
        (100, 0, 0, 1, "must be a multiple"),
        (5, 10, 0, 1, "less than one global batch"),
        (100, 10, 2, 2, "rank 2 is not one of 2"),
        (100, 10, -1, 2, "rank -1 is not one of 2"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_an_error(
    samples: int, batch: int, rank: int, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanSampler(samples, batch, rank=rank, world_size=world_size)


@pytest.mark.parametrize("num_rows", [4, 5, 7, 16, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_rows_come_once_each_in_equally_many_batches(
    num_rows: int, batch_size: int, world_size: int
) -> None:
    ranks = [EvenSampler(num_rows, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(sampler) for sampler in ranks} == {len(of_rank) for of_rank in batches} == {len(batches[0])}
    rows = [row for of_rank in batches for batch in of_rank for row in batch]
    assert sorted(rows) == list(range(num_rows))
    sizes = [len(batch) for of_rank in batches for batch in of_rank]
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2 if num_rows % world_size else 1)


def test_fewer_validation_images_than_ranks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="3 validation image"):
        EvenSampler(3, 8, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="val_batch_size_per_device is 0"):
        EvenSampler(3, 0)
