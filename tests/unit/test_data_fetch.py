"""Samples come by number; a bad one is replaced by another of its domain, told, and counted."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from distill.data import shard_reader
from distill.data.fetch import BadSample, PlannedDataset, RowDataset, collate
from distill.data.index import DatasetIndex, build_index
from distill.data.ledger import Counts, Ledger
from distill.data.loader import build_loader
from distill.data.plan import SamplePlan
from distill.data.samplers import PlanSampler
from distill.data.shard_reader import ShardReader
from distill.data.transforms import Augmentation
from distill.errors import ConfigError, DataError

MakeIndex = Callable[..., DatasetIndex]


def encoded(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (number * 5 % 256, 100, 255 - number * 5 % 256)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def make_index(tmp_path: Path) -> MakeIndex:
    """Return a function that writes shards by domain: how many samples, and which of them are damaged."""

    def make(**domains: tuple[int, list[int]]) -> DatasetIndex:
        for domain, (count, bad) in domains.items():
            for shard in range(2):
                with wds.TarWriter(str(tmp_path / f"{domain}-{shard}.tar")) as writer:
                    for number in range(shard * count // 2, (shard + 1) * count // 2):
                        data = encoded(number)
                        data = data[:-40] if number in bad else data
                        writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": number % 3})
        return build_index(tmp_path)

    return make


def test_rows_come_in_order_with_label_and_domain(make_index: MakeIndex) -> None:
    index = make_index(a=(4, []), b=(6, []))
    dataset = RowDataset(index, 32)
    assert len(dataset) == 10
    items = [dataset[row] for row in range(10)]
    assert [item["row"] for item in items] == list(range(10))
    assert [item["domain"] for item in items] == [0] * 4 + [1] * 6
    assert [index.label_names[item["label"]] for item in items[4:]] == ["0", "1", "2", "0", "1", "2"]
    for item, number in zip(items, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5], strict=True):
        assert item["image"].shape == (3, 32, 32)
        assert item["image"].dtype == torch.uint8
        assert abs(int(item["image"][0].float().mean()) - number * 5) <= 2


def test_rows_outside_the_index_are_an_error(make_index: MakeIndex) -> None:
    dataset = RowDataset(make_index(a=(4, [])), 32)
    for row in (4, -1):
        with pytest.raises(IndexError):
            dataset[row]


def test_a_bad_row_names_shard_and_key(make_index: MakeIndex) -> None:
    dataset = RowDataset(make_index(a=(4, [3])), 32)
    with pytest.raises(DataError, match=r"a-1\.tar: 000003: .* \(OSError: .*\); mend the image"):
        dataset[3]


def test_a_bad_planned_sample_is_replaced_by_another_of_its_domain_and_told(make_index: MakeIndex) -> None:
    index = make_index(a=(20, [4, 5]), b=(20, []))
    plan = SamplePlan(index, seed=1)
    dataset = PlannedDataset(plan, 16)
    items = [dataset[position] for position in range(40)]
    bad = [entry for item in items for entry in item["bad"]]
    planned_bad = [position for position in range(40) if plan[position] in (4, 5)]
    assert [entry.index for entry in bad if entry.attempt == 0] == planned_bad != []
    assert [item["index"] for item in items if item["substituted"]] == planned_bad
    for position in planned_bad:
        item = items[position]
        assert item["row"] not in (4, 5)
        assert item["domain"] == 0
        assert index.labels[item["row"]] == item["label"]
    assert bad[0].domain == "a"
    assert bad[0].shard.endswith("a-0.tar")
    assert bad[0].key in ("000004", "000005")
    assert "OSError" in bad[0].reason


def test_a_domain_that_is_all_bad_stops_by_name(make_index: MakeIndex) -> None:
    plan = SamplePlan(make_index(fine=(4, []), broken=(40, list(range(40)))))
    dataset = PlannedDataset(plan, 16)
    with pytest.raises(DataError, match="'broken' has no usable image within 17 tries"):
        [dataset[position] for position in range(4)]


def test_an_all_bad_domain_stops_from_a_worker_process_too(make_index: MakeIndex) -> None:
    dataset = PlannedDataset(SamplePlan(make_index(broken=(40, list(range(40))))), 16)
    with pytest.raises(DataError, match="'broken' has no usable image"):
        list(build_loader(dataset, PlanSampler(8, 4), num_workers=1, start_method="fork"))


def test_planned_items_are_the_same_whoever_asks(make_index: MakeIndex) -> None:
    index = make_index(a=(20, [3]), b=(20, []))
    augmentation = Augmentation(crop_scale_min=0.5)
    first = PlannedDataset(SamplePlan(index, seed=1), 16, augmentation)
    second = pickle.loads(pickle.dumps(first))
    for position in (0, 3, 39, 1000):
        one, other = first[position], second[position]
        assert torch.equal(one.pop("image"), other.pop("image"))
        assert one == other


def test_batches_hold_tensors_and_the_list_of_bad_samples(make_index: MakeIndex) -> None:
    index = make_index(a=(20, [3]))
    plan = SamplePlan(index, seed=1)
    batch = collate([PlannedDataset(plan, 16)[position] for position in range(20)])
    assert batch["images"].shape == (20, 3, 16, 16)
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    for name in ("domain", "label", "index", "row", "substituted"):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (20,)
    assert batch["index"].tolist() == list(range(20))
    assert int(batch["substituted"].sum()) == 1
    assert [entry.key for entry in batch["bad"] if entry.attempt == 0] == ["000003"]
    rows = collate([RowDataset(index, 16)[row] for row in (2, 1)])
    assert rows["index"].tolist() == rows["row"].tolist() == [2, 1]
    assert "bad" not in rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "start_method"),
    [
        (2, "fork"),
        pytest.param(2, "spawn", marks=pytest.mark.slow),
        pytest.param(1, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_change_nothing(make_index: MakeIndex, num_workers: int, start_method: str) -> None:
    dataset = PlannedDataset(SamplePlan(make_index(a=(20, [2]), b=(10, []))), 16, Augmentation())
    dataset[0]
    loaders = [
        build_loader(dataset, PlanSampler(24, 8, rank=1, world_size=2), num_workers=count, start_method=start_method)
        for count in (0, num_workers)
    ]
    for here, there in zip(*loaders, strict=True):
        assert here.pop("bad") == there.pop("bad")
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_loader_leaves_the_global_random_state_alone(make_index: MakeIndex) -> None:
    dataset = PlannedDataset(SamplePlan(make_index(a=(8, []))), 16, Augmentation())
    before = torch.get_rng_state()
    list(build_loader(dataset, PlanSampler(8, 4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_read_that_fails_for_a_moment_is_tried_again(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index(a=(4, []))
    reader = ShardReader(index.shards, retry_delays_s=(0, 0))
    failures = iter([OSError("stale handle"), OSError("stale handle")])
    real = os.pread

    def flaky(*arguments: int) -> bytes:
        for error in failures:
            raise error
        return real(*arguments)

    monkeypatch.setattr(shard_reader.os, "pread", flaky)
    offset, size = int(index.offsets[1]), int(index.sizes[1])
    assert reader.read(0, offset, size) == Path(index.shards[0].location).read_bytes()[offset : offset + size]


def test_a_read_that_keeps_failing_is_an_error_and_no_bad_sample(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PlannedDataset(SamplePlan(make_index(a=(4, []))), 16)
    dataset.rows.reader = ShardReader(dataset.plan.index.shards, retry_delays_s=(0, 0))

    def failing(*arguments: int) -> bytes:
        raise OSError("input/output error")

    monkeypatch.setattr(shard_reader.os, "pread", failing)
    with pytest.raises(DataError, match="cannot be read .* after 2 retries"):
        dataset[0]


def test_a_shard_that_is_gone_or_changed_is_named(make_index: MakeIndex) -> None:
    index = make_index(a=(4, []))
    Path(index.shards[0].location).unlink()
    reader = ShardReader(index.shards, retry_delays_s=())
    with pytest.raises(DataError, match="a-0.tar cannot be read"):
        reader.read(0, 512, 10)
    with Path(index.shards[1].location).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="a-1.tar has .* when it was indexed"):
        reader.read(1, 512, 10)


def count_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_stay_open_and_none_travels(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "MAX_OPEN_FILES", 2)
    index = make_index(a=(4, []), b=(4, []), c=(4, []))
    dataset = RowDataset(index, 16)
    before = count_open_files() if Path("/proc/self/fd").exists() else None
    for row in (*range(12), *range(12)):
        dataset[row]
    if before is not None:
        assert count_open_files() <= before + 2
    assert pickle.loads(pickle.dumps(dataset))[5]["row"] == 5
    dataset.reader.close()
    if before is not None:
        assert count_open_files() == before


def bad_sample(position: int, domain: str = "ocr", attempt: int = 0) -> BadSample:
    return BadSample(position, attempt, position, domain, f"{domain}-0.tar", f"{position:06d}", "truncated")


def test_seen_and_quarantined_add_up_to_planned(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger" / "rank-0.jsonl", max_bad_fraction=0.5)
    ledger.record(["ocr"] * 6 + ["chart"] * 2, [bad_sample(3), bad_sample(3, attempt=1)])
    ledger.record(["ocr"] * 8, [bad_sample(9)])
    counts = ledger.counts()
    assert counts == {"chart": Counts(2, 0), "ocr": Counts(14, 2)}
    assert all(entry.seen + entry.quarantined == entry.planned for entry in counts.values())
    assert "16 samples planned = 14 seen + 2 quarantined" in ledger.summary()


def test_every_bad_sample_is_a_line_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "rank-0.jsonl"
    Ledger(path).record(["ocr"], [bad_sample(3)])
    Ledger(path).record(["ocr"], [bad_sample(4)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == [3, 4]
    assert lines[0] | {"index": 0} == {
        "index": 0,
        "attempt": 0,
        "row": 3,
        "domain": "ocr",
        "shard": "ocr-0.tar",
        "key": "000003",
        "reason": "truncated",
    }


def test_without_bad_samples_no_ledger_file_is_made(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger" / "rank-0.jsonl").record(["ocr"], [])
    assert not list(tmp_path.iterdir())


def test_too_many_bad_samples_stop_the_run_with_the_domains_name(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.jsonl", max_bad_fraction=0.02)
    ledger.record(["chart"] * 1000 + ["ocr"] * 99, [bad_sample(n) for n in range(50)])
    with pytest.raises(
        DataError, match=r"'ocr' has 51 bad images among 100 planned \(51.0%\).*max_bad_fraction = 0.02"
    ):
        ledger.record(["ocr"], [bad_sample(50)])


def test_bad_samples_within_the_limit_do_not_stop_the_run() -> None:
    ledger = Ledger(None, max_bad_fraction=0.02)
    ledger.record(["ocr"] * 200, [bad_sample(n) for n in range(4)])
    assert ledger.counts()["ocr"].quarantined == 4


def test_the_first_bad_sample_of_a_domain_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(None, max_bad_fraction=1)
    ledger.record(["ocr"] * 1500, [bad_sample(n) for n in range(1500)])
    assert len(caplog.records) == 2
    assert "ocr-0.tar: 000000 (truncated)" in caplog.text


def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        Ledger(tmp_path / "file" / "x.jsonl").record(["ocr"], [bad_sample(0)])


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_names_its_key(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_bad_fraction"):
        Ledger(None, fraction)


def test_scaled_decoding_reaches_training_and_validation_views(tmp_path: Path) -> None:
    from distill.data.datamodule import ShardDataModule
    from distill.data.transforms import Augmentation

    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    with tarfile.open(tmp_path / "x-0.tar", "w") as archive:
        info = tarfile.TarInfo("0.jpg")
        info.size = len(buffer.getvalue())
        archive.addfile(info, io.BytesIO(buffer.getvalue()))
    views = {}
    for is_scaled in (False, True):
        data = ShardDataModule(
            str(tmp_path),
            val=str(tmp_path),
            img_size_px=64,
            global_batch_size=1,
            num_workers=0,
            augment=Augmentation(reencode="none"),
            scaled_decoding=is_scaled,
        )
        data.setup("fit")
        loaders = (data.train_dataloader(), data.val_dataloader())
        views[is_scaled] = [next(iter(loader))["images"] for loader in loaders]
    for whole, scaled in zip(views[False], views[True], strict=True):
        assert not torch.equal(whole, scaled)
    assert torch.equal(*views[True])
