"""The same global batches at any number of processes and workers, any accumulation and any resume point."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.domain_order import FullShuffle, WindowShuffle, seed_of
from distill.data.index import DatasetIndex, build_index
from distill.data.plan_segments import Mix, Schedule, WeightChange
from distill.data.position import PlanPosition, lay_plan
from distill.data.samplers import PlanSampler

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports each test file by itself
RankProcesses = import_module("rank_processes").RankProcesses

SHARDS = {"a": (5, 9, 2), "b": (4,), "c": (7, 12)}
DOMAINS = tuple(SHARDS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("shards")
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    for domain, counts in SHARDS.items():
        for shard, count in enumerate(counts):
            with wds.TarWriter(str(folder / f"{domain}-{shard}.tar")) as writer:
                for number in range(count):
                    writer.write({"__key__": f"{number:06d}", "png": buffer.getvalue()})
    return build_index(folder)


@dataclass(frozen=True)
class Leg:
    """A stretch of a run between two resumes."""

    world_size: int
    workers: int
    accumulated: int
    images_a_batch: int
    steps: int

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.accumulated * self.images_a_batch


legs = st.lists(
    st.builds(
        Leg,
        world_size=st.integers(1, 4),
        workers=st.integers(1, 3),
        accumulated=st.integers(1, 3),
        images_a_batch=st.integers(1, 3),
        steps=st.integers(1, 4),
    ),
    min_size=1,
    max_size=4,
)
mixes = st.fixed_dictionaries({domain: st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0]) for domain in DOMAINS})
changes = st.dictionaries(st.integers(1, 9), mixes, max_size=3).map(
    lambda of_step: [WeightChange(step, of_step[step]) for step in sorted(of_step)]
)


def expected_steps(
    index: DatasetIndex,
    run: Sequence[Leg],
    weights: Mapping[str, float],
    changes: Sequence[WeightChange],
    seed: int,
    window: int | None,
) -> list[list[int]]:
    """Say each step's rows by counting one by one, as a person would."""
    orders = {}
    for domain in DOMAINS:
        rows, own_seed = index.range_of(domain), seed_of(seed, domain)
        first = [shard.first_row for shard in index.shards if shard.domain == domain]
        orders[domain] = WindowShuffle(first, rows.stop, own_seed, window) if window else FullShuffle(rows, own_seed)
    at_step = {change.from_step: change.weights for change in changes}
    given, counts, offset, steps = {}, dict.fromkeys(DOMAINS, 0), 0, []
    for size in [leg.global_batch_size for leg in run for _ in range(leg.steps)]:
        new = at_step.get(len(steps), given or weights)
        if new != given:
            given, offset, mix = new, 0, Mix({domain: new[domain] for domain in DOMAINS})
        rows = []
        for _ in range(size):
            domain, _ = mix[offset]
            rows.append(orders[domain][counts[domain]])
            counts[domain] += 1
            offset += 1
        steps.append(rows)
    return steps


def run_leg(plan: Any, leg: Leg, start: int) -> dict[int, int]:
    """Return plan position -> row over all ranks; each worker has a copy of the plan and every n-th batch."""
    seen: dict[int, int] = {}
    batch_size = leg.global_batch_size // leg.accumulated
    for rank in range(leg.world_size):
        batches = leg.steps * leg.accumulated
        sampler = PlanSampler(batches * batch_size, batch_size, rank=rank, world_size=leg.world_size, start=start)
        copies = [pickle.loads(pickle.dumps(plan)) for _ in range(leg.workers)]
        listed = list(sampler)
        for worker in reversed(range(leg.workers)):
            for batch in listed[worker :: leg.workers]:
                for position in batch:
                    assert position not in seen, "a position came twice"
                    seen[position] = copies[worker][position]
    return seen


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(run=legs, weights=mixes, changes=changes, seed=st.integers(0, 2**32 - 1), window=st.none() | st.integers(1, 20))
@pytest.mark.slow
def test_every_topology_and_resume_gives_the_plans_global_batches(
    index: DatasetIndex,
    run: list[Leg],
    weights: dict[str, float],
    changes: list[WeightChange],
    seed: int,
    window: int | None,
) -> None:
    expected = expected_steps(index, run, weights, changes, seed, window)
    schedule = Schedule(weights, changes, DOMAINS)
    saved, step = None, 0
    for leg in run:
        size = leg.global_batch_size
        plan = lay_plan(index, schedule, seed=seed, shuffle_window=window, global_batch_size=size, saved=saved)
        start = saved.consumed if saved else 0
        seen = run_leg(plan, leg, start)
        assert sorted(seen) == list(range(start, start + leg.steps * size))
        for number in range(leg.steps):
            rows = [seen[start + number * size + place] for place in range(size)]
            assert rows == expected[step + number]
        step, consumed = step + leg.steps, start + leg.steps * size
        begun = [segment for segment in plan.segments if segment.start <= consumed]
        position = PlanPosition(consumed, 0, step, index.fingerprint, seed, window, begun, size, leg.accumulated, 0, 0)
        saved = PlanPosition.from_state_dict(json.loads(json.dumps(position.state_dict())))


class Run:
    """What a run of the demo recipe left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def batches(self) -> dict[int, list[tuple[int, int]]]:
        """Return each step's (place in the plan, row), over all ranks, in order of place."""
        steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for file in sorted((self.folder / "ledger").glob("samples-rank-*.csv")):
            with file.open() as stream:
                for line in csv.DictReader(stream):
                    steps[int(line["step"])].append((int(line["index"]), int(line["row"])))
        return {step: sorted(pairs) for step, pairs in sorted(steps.items())}

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "ledger" / "summary.json").read_text())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


COMMON = (
    "--data.record_samples=true",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--data.weight_changes=[{from_step: 5, weights: {natural: 3, ocr: 1, chart: 2, multidisciplinary: 1}}]",
)
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp")


def fit(demo_recipe: Any, folder: Path, *words: str) -> Run:
    world_size = 2 if TWO_RANKS[0] in words else 1
    ranks = RankProcesses(demo_recipe.words(folder, *COMMON, *words), world_size, folder.with_suffix(".log"))
    assert ranks.finish(timeout_s=600) == [0] * world_size, ranks.text()[-3000:]
    return Run(folder)


@pytest.mark.slow
def test_the_demo_recipe_resumes_on_another_number_of_ranks_with_the_same_batches(
    demo_recipe: Any, tmp_path: Path
) -> None:
    whole = fit(demo_recipe, tmp_path / "whole", "--trainer.max_steps=9")
    expected = whole.batches()
    assert list(expected) == list(range(9))
    assert [len(pairs) for pairs in expected.values()] == [8] * 9
    forked = ("--data.num_workers=1", "--data.worker_start_method=forkserver")
    first = fit(demo_recipe, tmp_path / "one", "--trainer.max_steps=4", *forked)
    spawned = ("--data.num_workers=1", "--data.worker_start_method=spawn", "--trainer.accumulate_grad_batches=2")
    resumed = (f"--ckpt_path={first.checkpoint}", *TWO_RANKS, *spawned)
    second = fit(demo_recipe, tmp_path / "two", "--trainer.max_steps=6", *resumed)
    assert len(list((tmp_path / "two" / "ledger").glob("samples-rank-*.csv"))) == 2
    last = fit(demo_recipe, tmp_path / "again", "--trainer.max_steps=9", f"--ckpt_path={second.checkpoint}")
    assert first.batches() | second.batches() | last.batches() == expected
    assert [list(run.batches()) for run in (first, second, last)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert last.summary["domains"] == whole.summary["domains"]
    assert last.summary["planned"] == last.summary["seen"] == 72
    assert last.summary["position"]["segments"] == whole.summary["position"]["segments"]
