"""Where the mix changes every domain goes on in its own sequence, and what was gone through stays as it was."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from distill.data.domain_order import WindowShuffle
from distill.data.index import DatasetIndex, build_index
from distill.data.plan import SamplePlan
from distill.data.plan_segments import Mix, Schedule, WeightChange
from distill.data.position import PlanPosition, lay_plan
from distill.errors import ConfigError, DataError

EVEN = {"a": 1.0, "b": 1.0}


def write_shard(path: Path, count: int, colour: int = 0) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(buffer, "PNG")
    with wds.TarWriter(str(path), mtime=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"{number:06d}", "png": buffer.getvalue()})


MakeIndex = Callable[..., DatasetIndex]


@pytest.fixture
def make_index(tmp_path: Path) -> MakeIndex:
    """Return a function that writes shards, given their sizes by domain, and indexes them."""

    def make(folder: str = "shards", **counts: Sequence[int]) -> DatasetIndex:
        (tmp_path / folder).mkdir()
        for domain, sizes in counts.items():
            for shard, count in enumerate(sizes):
                write_shard(tmp_path / folder / f"{domain}-{shard:03d}.tar", count, shard)
        return build_index(tmp_path / folder)

    return make


def rows_of(plan: SamplePlan, domain: str, positions: range) -> list[int]:
    rows = [plan[position] for position in positions]
    return [row for row in rows if row in plan.index.range_of(domain)]


def lay(index: DatasetIndex, changes: Sequence[WeightChange] = (), **options: object) -> SamplePlan:
    defaults = {"seed": 0, "shuffle_window": None, "global_batch_size": 4}
    return lay_plan(index, Schedule(EVEN, changes, index.domains), **(defaults | options))


def position_at(plan: SamplePlan, step: int, size: int = 4, **changes: object) -> PlanPosition:
    """Return what a checkpoint of a run that did `step` steps of `size` images keeps, as it comes back from a file."""
    consumed = step * size
    segments = [segment for segment in plan.segments if segment.start <= consumed]
    fingerprint = plan.index.fingerprint
    position = PlanPosition(
        consumed, 0, step, fingerprint, plan.seed, plan.shuffle_window, segments, size, 1, step, step
    )
    state = json.loads(json.dumps(dataclasses.replace(position, **changes).state_dict()))
    return PlanPosition.from_state_dict(state)


def test_a_plan_is_the_same_in_every_release(make_index: MakeIndex) -> None:
    # These numbers are what the first release gave: a change of them breaks every run that is resumed.
    index = make_index(a=[5, 6], b=[7])
    plan = SamplePlan(index, {"a": 3, "b": 1}, seed=7)
    assert [plan[position] for position in range(16)] == [2, 5, 10, 14, 9, 1, 0, 15, 3, 8, 6, 12, 7, 4, 4, 13]
    windowed = SamplePlan(index, {"a": 3, "b": 1}, seed=7, shuffle_window=4)
    assert [windowed[position] for position in range(16)] == [1, 2, 3, 13, 0, 7, 5, 14, 4, 6, 10, 11, 9, 8, 8, 12]


def test_a_mix_counts_each_domain_at_any_place() -> None:
    mix = Mix({"a": 0.7, "b": 0.29, "c": 0.01})
    counted: Counter[str] = Counter()
    for offset in range(300):
        assert mix.counts(offset) == {domain: counted[domain] for domain in "abc"}
        counted[mix[offset][0]] += 1
    assert counted == {"a": 210, "b": 87, "c": 3}


def test_a_change_of_weights_neither_repeats_nor_skips_a_sample_of_any_domain(make_index: MakeIndex) -> None:
    index = make_index(a=[40], b=[40])
    plain = SamplePlan(index, EVEN, seed=3)
    changed = lay(index, [WeightChange(5, {"a": 3, "b": 1}), WeightChange(9, {"a": 1, "b": 7})], seed=3)
    for domain in "ab":
        expected = rows_of(plain, domain, range(200))
        assert rows_of(changed, domain, range(80)) == expected[: len(rows_of(changed, domain, range(80)))]
    passes = rows_of(changed, "a", range(200))
    assert sorted(passes[:40]) == list(range(40))


def test_each_segment_holds_its_own_weights_exactly(make_index: MakeIndex) -> None:
    index = make_index(a=[300], b=[300])
    plan = lay(index, [WeightChange(10, {"a": 3, "b": 1}), WeightChange(30, {"a": 1, "b": 9})])
    spans = [(range(40), (20, 20)), (range(40, 120), (60, 20)), (range(120, 220), (10, 90))]
    for span, (of_a, of_b) in spans:
        assert (len(rows_of(plan, "a", span)), len(rows_of(plan, "b", span))) == (of_a, of_b)


def test_places_behind_a_change_can_be_asked_for_in_any_order_and_far_ahead(make_index: MakeIndex) -> None:
    index = make_index(a=[30], b=[20])
    changes = [WeightChange(3, {"a": 3, "b": 1}), WeightChange(10**9, {"a": 1, "b": 5})]
    forward = [lay(index, changes)[position] for position in range(60)]
    other = lay(index, changes)
    assert [other[position] for position in reversed(range(60))] == forward[::-1]
    assert 0 <= other[4 * 10**9 + 5] < len(index)


def test_a_change_that_changes_nothing_starts_no_segment(make_index: MakeIndex) -> None:
    index = make_index(a=[30], b=[20])
    assert len(lay(index, [WeightChange(3, EVEN)]).segments) == 1


@pytest.mark.parametrize("window", [1, 3, 8, 17, 1000])
def test_a_windowed_pass_holds_every_row_once_in_new_order(window: int) -> None:
    order = WindowShuffle([10, 15, 16, 30], 37, seed=5, window=window)
    passes = [[order[27 * number + place] for place in range(27)] for number in range(4)]
    assert all(sorted(rows) == list(range(10, 37)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 4
    assert [order[place] for place in reversed(range(108))] == list(itertools.chain(*passes))[::-1]


def test_a_window_takes_the_shards_one_after_another(make_index: MakeIndex) -> None:
    index = make_index(a=[10] * 12)
    plan = SamplePlan(index, seed=1, shuffle_window=20)
    shards = [int(index.shard_ids[plan[position]]) for position in range(240)]
    for begin in range(0, 240, 20):
        assert len(set(shards[begin : begin + 20])) == 2
    assert shards[:120] != sorted(shards[:120])
    assert set(shards[:20]) != set(shards[120:140]) or set(shards[20:40]) != set(shards[140:160])
    rows = [plan[position] for position in range(20)]
    assert rows != sorted(rows)
    assert len({int(index.shard_ids[SamplePlan(index, seed=1)[position]]) for position in range(20)}) > 4


def test_a_window_of_no_rows_names_its_key(make_index: MakeIndex) -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle_window is 0"):
        SamplePlan(make_index(a=[3]), shuffle_window=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([WeightChange(0, EVEN)], r"data\.weight_changes\[0\]\.from_step is 0; it must be at least 1"),
        ([WeightChange(4, EVEN), WeightChange(4, EVEN)], r"weight_changes\[1\]\.from_step is 4; it must be above 4"),
        ([WeightChange(1, {"a": 1})], r"data\.weight_changes\[0\]\.weights does not name b"),
        ([WeightChange(1, {"a": 1, "b": 1, "x": 1})], r"weight_changes\[0\]\.weights names the domain\(s\) x"),
        ([WeightChange(1, {"a": 1, "b": -2})], r"weight_changes\[0\]\.weights\.b is -2"),
    ],
)
def test_changes_that_cannot_work_name_their_entry(changes: list[WeightChange], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(EVEN, changes, ("a", "b"))


@pytest.mark.parametrize("step", [2, 5, 6, 9])
def test_a_resumed_plan_is_the_plan_that_went_on(make_index: MakeIndex, step: int) -> None:
    index = make_index(a=[30], b=[20])
    changes = [WeightChange(5, {"a": 3, "b": 1}), WeightChange(8, {"a": 1, "b": 2})]
    plan = lay(index, changes)
    resumed = lay(index, changes, saved=position_at(plan, step))
    assert resumed.segments == plan.segments
    assert [resumed[place] for place in range(60)] == [plan[place] for place in range(60)]


def test_later_changes_may_be_added_altered_and_taken_away_on_resume(make_index: MakeIndex) -> None:
    index = make_index(a=[30], b=[20])
    done = WeightChange(3, {"a": 3, "b": 1})
    saved = position_at(lay(index, [done, WeightChange(8, {"a": 1, "b": 2})]), 6)
    for later in ([], [WeightChange(6, {"a": 1, "b": 9})], [WeightChange(7, {"a": 5, "b": 1}), WeightChange(9, EVEN)]):
        resumed, fresh = lay(index, [done, *later], saved=saved), lay(index, [done, *later])
        assert [resumed[place] for place in range(80)] == [fresh[place] for place in range(80)]
        assert resumed.segments == fresh.segments


@pytest.mark.parametrize(
    "changes", [[], [WeightChange(2, {"a": 3, "b": 1})], [WeightChange(3, {"a": 2, "b": 1})],
                [WeightChange(3, {"a": 3, "b": 1}), WeightChange(5, EVEN)]],
)  # fmt: skip
def test_changes_of_steps_that_were_done_are_refused(make_index: MakeIndex, changes: list[WeightChange]) -> None:
    index = make_index(a=[30], b=[20])
    saved = position_at(lay(index, [WeightChange(3, {"a": 3, "b": 1})]), 6)
    with pytest.raises(DataError, match=r"in steps that were done.*up to step 5; changes from step 6 on may be"):
        lay(index, changes, saved=saved)


def test_another_global_batch_size_moves_later_changes_to_their_steps(make_index: MakeIndex) -> None:
    index = make_index(a=[30], b=[20])
    changes = [WeightChange(2, {"a": 3, "b": 1}), WeightChange(8, {"a": 1, "b": 2})]
    saved = position_at(lay(index, changes), 5)
    resumed = lay(index, changes, saved=saved, global_batch_size=10)
    assert [segment.start for segment in resumed.segments] == [0, 8, 20 + 3 * 10]
    again = lay(index, changes, saved=position_at(resumed, 7, consumed=40), global_batch_size=6)
    assert [segment.start for segment in again.segments] == [0, 8, 40 + 6]


def test_new_data_go_on_where_a_domains_shards_are_the_same(make_index: MakeIndex, tmp_path: Path) -> None:
    old = make_index(a=[30], b=[20])
    saved = position_at(lay(old), 6)
    shutil.copytree(tmp_path / "shards", tmp_path / "more")
    write_shard(tmp_path / "more" / "b-001.tar", 9)
    new = build_index(tmp_path / "more")
    plan = lay(new, saved=saved)
    assert (plan.first_position, plan.segments[-1].from_step) == (24, 6)
    assert plan.segments[-1].passed == {"a": 12, "b": 0}
    before = rows_of(lay(old), "a", range(24))
    assert sorted(before + rows_of(plan, "a", range(24, 60))) == list(range(30))
    assert sorted(rows_of(plan, "b", range(24, 24 + 58))) == list(range(30, 59))
    with pytest.raises(IndexError, match="present data starts at 24"):
        plan[23]
    later = lay(new, saved=position_at(plan, 8))
    assert [later[place] for place in range(24, 90)] == [plan[place] for place in range(24, 90)]
    assert later.segments == plan.segments


def test_new_data_may_bring_a_new_domain(make_index: MakeIndex) -> None:
    saved = position_at(lay(make_index(a=[30], b=[20])), 6)
    more = make_index("more", a=[30], b=[20], c=[5])
    schedule = Schedule({"a": 1, "b": 1, "c": 2}, [], more.domains)
    options = {"seed": 0, "shuffle_window": None, "global_batch_size": 4}
    plan = lay_plan(more, schedule, saved=saved, **options)
    assert plan.segments[-1].passed == {"a": 12, "b": 12, "c": 0}
    assert len(rows_of(plan, "c", range(24, 44))) == 10
    again = lay_plan(more, schedule, saved=position_at(plan, 9), **options)
    assert again.segments == plan.segments
