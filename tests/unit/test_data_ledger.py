"""The ledger counts what the model went through: not what was only loaded, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill.data.bookkeeping import Books, SampleRecord, counts_from_state, counts_state, write_summary
from distill.data.fetch import BadSample
from distill.data.ledger import Counts, Ledger, added
from distill.data.position import PlanPosition
from distill.errors import DataError
from distill.trainer_view import TrainerView


def bad_sample(position: int, domain: str = "ocr", attempt: int = 0) -> BadSample:
    return BadSample(position, attempt, position, domain, f"{domain}-0.tar", f"{position:06d}", "truncated")


def test_a_batch_counts_once_the_model_has_gone_through_it() -> None:
    ledger = Ledger(None, 1)
    ledger.record(["ocr"] * 4, [bad_sample(1)], range(4))
    assert (ledger.settled(), ledger.counts()) == ({}, {"ocr": Counts(4, 1)})
    ledger.settle(4)
    ledger.record(["ocr"] * 4, [bad_sample(6)], range(4, 8))
    assert ledger.settled() == {"ocr": Counts(4, 1)}


def test_a_batch_that_is_handed_over_again_counts_once() -> None:
    ledger = Ledger(None, 1)
    ledger.record(["ocr"] * 4, [], range(4))
    ledger.settle(4)
    for _ in range(2):
        ledger.record(["ocr"] * 3 + ["chart"], [bad_sample(5)], range(4, 8))
    ledger.settle(8)
    assert ledger.settled() == {"chart": Counts(1, 0), "ocr": Counts(7, 1)}


@pytest.mark.parametrize("second", [range(8, 12), range(2, 6)])
def test_samples_left_out_or_repeated_stop_the_run(second: range) -> None:
    ledger = Ledger(None)
    ledger.record(["ocr"] * 4, [], range(4))
    ledger.settle(4)
    ledger.record(["ocr"] * 4, [], second)
    with pytest.raises(DataError, match=f"position 4 was due, and the model stands at {second.start}"):
        ledger.settle(second.stop)


def test_steps_that_were_done_without_a_batch_stop_the_run() -> None:
    ledger = Ledger(None, start=8)
    ledger.settle(8)
    with pytest.raises(DataError, match="position 8 was due, and the model stands at 12"):
        ledger.settle(12)


def test_the_limit_holds_over_resumes() -> None:
    ledger = Ledger(None, 0.02, before={"ocr": Counts(98, 2)})
    with pytest.raises(DataError, match="'ocr' has 3 bad images among 100 planned"):
        ledger.record(["ocr"] * 2, [bad_sample(98)], range(2))
    Ledger(None, 0.02).record(["ocr"] * 2, [bad_sample(98)], range(2))


def test_counts_add_up_and_come_back_from_a_checkpoint() -> None:
    both = added({"a": Counts(3, 1)}, {"a": Counts(4, 0), "b": Counts(2, 2)})
    assert both == {"a": Counts(7, 1), "b": Counts(2, 2)}
    assert counts_from_state(json.loads(json.dumps(counts_state(both)))) == both


def batch_of(index: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in {"index": index, "row": index, "domain": [0] * 4}.items()}


@pytest.mark.parametrize("index", [[0, 1, 2, 4], [3, 2, 1, 0], [0, 2, 4, 6]])
def test_a_batch_of_other_samples_than_the_plans_stops_the_run(index: list[int]) -> None:
    books = Books(TrainerView(None), ["a"], 0.01)
    with pytest.raises(DataError, match="another sampler or loader has taken the plan's place"):
        books.enter(batch_of(index), [], consumed=0, size=4, step=0)


def position(consumed: int) -> PlanPosition:
    return PlanPosition(consumed, 0, consumed // 4, "f", 0, None, [], 4, 1, consumed // 4, 0)


def test_books_that_do_not_balance_name_both_numbers() -> None:
    books = Books(TrainerView(None), ["a"], 0.01, before={"a": Counts(3, 0)}, start=4)
    books.enter(batch_of([4, 5, 6, 7]), [], consumed=4, size=4, step=1)
    with pytest.raises(DataError, match=r"went through 8 plan positions, and the ledger has 7 samples"):
        books.close(position(8))


def test_the_summary_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "summary.json"
    write_summary(path, position(4), {"a": Counts(4, 0)})
    write_summary(path, position(8), {"a": Counts(6, 1), "b": Counts(2, 0)})
    summary = json.loads(path.read_text())
    assert {name: summary[name] for name in ("planned", "seen", "quarantined")} == {
        "planned": 8,
        "seen": 7,
        "quarantined": 1,
    }
    assert summary["domains"]["a"] == {"planned": 6, "seen": 5, "quarantined": 1}
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, position(4), {"a": Counts(4, 0)})
    before = path.read_text()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match=r"summary.json cannot be written \(No space left on device\)"):
        write_summary(path, position(8), {"a": Counts(8, 0)})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_the_record_of_samples_goes_on_when_a_run_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "samples.csv"
    SampleRecord(path, is_new=True).write(0, [0, 2], [7, 5])
    SampleRecord(path, is_new=False).write(1, [4], [3])
    assert path.read_text() == "step,index,row\n0,0,7\n0,2,5\n1,4,3\n"
    SampleRecord(path, is_new=True)
    assert path.read_text() == "step,index,row\n"


def test_a_record_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="record of samples .* cannot be written"):
        SampleRecord(tmp_path / "file" / "samples.csv", is_new=True)
