"""The data module under a real Trainer: batches, position, resume, ledger."""

from __future__ import annotations

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from distill.data.datamodule import ShardDataModule
from distill.data.plan_segments import WeightChange
from distill.data.transforms import Augmentation
from distill.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*Total length of `list` across ranks is zero.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated.*"),
]


def write_shards(folder: Path, bad: tuple[int, ...] = (), **counts: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for domain, count in counts.items():
        with wds.TarWriter(str(folder / f"{domain}-000000.tar"), mtime=0) as writer:
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 16), (number * 9 % 256, 50, 90)).save(buffer, "JPEG")
                data = buffer.getvalue()[: -40 if number in bad else None]
                writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": number % 2})
    return str(folder)


class Recorder(LightningModule):
    """The smallest model that trains; it keeps the plan positions and rows of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen: list[list[int]] = []
        self.rows: list[list[int]] = []
        self.val_rows: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert all(isinstance(value, Tensor) for value in batch.values())
        self.seen.append(batch["index"].tolist())
        self.rows.append(batch["row"].tolist())
        return self.layer(batch["images"].float().mean((2, 3)) / 255).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_rows += batch["row"].tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**(defaults | options))


def make_data(train: str, **options: Any) -> ShardDataModule:
    defaults: dict[str, Any] = {
        "img_size_px": 16,
        "global_batch_size": 4,
        "num_workers": 0,
        "augment": Augmentation(reencode="none"),
    }
    return ShardDataModule(train, **(defaults | options))


def fit(folder: Path, data: ShardDataModule, ckpt_path: str | None = None, **options: Any) -> Recorder:
    model = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        make_trainer(folder, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def checkpoint_at(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def test_an_epoch_goes_once_through_the_plan(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=12, b=11))
    model = fit(tmp_path, data)
    assert model.seen == [[4 * step + n for n in range(4)] for step in range(5)]
    assert data.consumed == 20
    assert data.domains == ("a", "b")


def test_later_epochs_go_on_in_the_plan(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=12), samples_per_epoch=8)
    model = fit(tmp_path, data, max_epochs=3)
    assert [position for batch in model.seen for position in batch] == list(range(24))


def test_an_epoch_cut_short_loses_no_sample(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=12))
    model = fit(tmp_path, data, max_epochs=3, limit_train_batches=2)
    assert [position for batch in model.seen for position in batch] == list(range(24))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("done", [1, 4, 5, 7])
def test_resuming_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(
    tmp_path: Path, done: int, num_workers: int
) -> None:
    shards = write_shards(tmp_path / "train", a=12, b=11)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    data = make_data(shards, num_workers=num_workers)
    whole = fit(tmp_path, data, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
    assert len(whole.seen) == 10
    saved = tmp_path / "ckpt" / f"step={done}.ckpt"
    assert torch.load(saved, weights_only=True)["ShardDataModule"]["consumed"] == 4 * done
    resumed = fit(tmp_path, make_data(shards, num_workers=num_workers), ckpt_path=str(saved), max_epochs=2)
    assert resumed.seen == whole.seen[done:]
    assert resumed.rows == whole.rows[done:]


def test_resuming_gives_bit_equal_weights(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=12, b=11)
    torch.manual_seed(0)
    whole = fit(tmp_path, make_data(shards), max_epochs=2)
    torch.manual_seed(0)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=3)]
    fit(tmp_path, make_data(shards), max_steps=3, enable_checkpointing=True, callbacks=callbacks)
    resumed = fit(tmp_path, make_data(shards), ckpt_path=str(tmp_path / "ckpt" / "step=3.ckpt"), max_epochs=2)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_accumulated_batches_make_the_same_global_batches(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=24)
    whole = fit(tmp_path, make_data(shards))
    data = make_data(shards)
    parts = fit(tmp_path, data, accumulate_grad_batches=2)
    assert [len(batch) for batch in parts.seen] == [2] * 12
    joined = [first + second for first, second in zip(parts.seen[::2], parts.seen[1::2], strict=True)]
    assert joined == whole.seen
    assert data.consumed == 24


def test_resuming_an_accumulating_run_goes_on_exactly(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=24)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=2)]
    whole = fit(tmp_path, make_data(shards), accumulate_grad_batches=2, enable_checkpointing=True, callbacks=callbacks)
    saved = str(tmp_path / "ckpt" / "step=2.ckpt")
    resumed = fit(tmp_path, make_data(shards), ckpt_path=saved, accumulate_grad_batches=2)
    assert resumed.seen == whole.seen[4:]


def test_a_checkpoint_from_within_an_accumulated_step_goes_on_behind_its_images_with_a_warning(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=24)
    val = write_shards(tmp_path / "val", a=2)
    callbacks: list[Callback] = [
        ModelCheckpoint(tmp_path / "ckpt", filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    ]
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    whole = fit(tmp_path, make_data(shards, val=val), callbacks=callbacks, val_check_interval=3, max_steps=3, **options)
    assert whole.seen[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    saved = tmp_path / "ckpt" / "step=1.ckpt"
    state = torch.load(saved, weights_only=True)["ShardDataModule"]
    assert (state["consumed"], state["within_step"]) == (6, 2)
    with pytest.warns(UserWarning, match="first 2 images are not gone through again"):
        resumed = fit(tmp_path, make_data(shards, val=val), ckpt_path=str(saved), accumulate_grad_batches=2)
    assert resumed.seen == [[n, n + 1] for n in range(6, 24, 2)]


@pytest.mark.parametrize(("size", "done"), [(6, 3), (2, 3), (12, 5)])
def test_another_global_batch_size_goes_on_at_the_same_sample(tmp_path: Path, size: int, done: int) -> None:
    shards = write_shards(tmp_path / "train", a=24)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    fit(tmp_path, make_data(shards), max_steps=done, enable_checkpointing=True, callbacks=callbacks)
    data = make_data(shards, global_batch_size=size)
    saved = str(tmp_path / "ckpt" / f"step={done}.ckpt")
    resumed = fit(tmp_path, data, ckpt_path=saved, max_epochs=3, max_steps=done + 2)
    first = 4 * done
    assert resumed.seen == [list(range(first, first + size)), list(range(first + size, first + 2 * size))]
    assert data.state_dict()["consumed"] == first + 2 * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "differs in its seed: 0 there, 1 here"),
        ({"weights": {"a": 1.0, "b": 2.0}}, "differs in its weights"),
        ({"train": "other"}, "differs in its fingerprint"),
    ],
)
def test_another_plan_is_refused_on_resume(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shards = write_shards(tmp_path / "train", a=8, b=8)
    other = write_shards(tmp_path / "other", a=8, b=9)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt")]
    fit(tmp_path, make_data(shards), max_steps=1, enable_checkpointing=True, callbacks=callbacks)
    if "train" in change:
        change = {"train": other}
    data = make_data(**({"train": shards} | change))
    with pytest.raises(DataError, match=message):
        fit(tmp_path, data, ckpt_path=str(tmp_path / "ckpt" / "step=1.ckpt"))


def test_a_position_of_another_version_is_refused(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=8))
    data.setup("fit")
    with pytest.raises(DataError, match="does not read"):
        data.load_state_dict({"consumed": 4})


def test_bad_samples_reach_the_ledger_and_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(write_shards(tmp_path / "train", a=20, bad=(3, 7)), max_bad_fraction=0.5)
    with caplog.at_level("INFO"):
        fit(tmp_path, data)
    counts = data.ledger.counts()["a"]
    assert (counts.planned, counts.seen, counts.quarantined) == (20, 18, 2)
    assert "20 samples planned = 18 seen + 2 quarantined" in caplog.text
    lines = (tmp_path / "ledger" / "rank-00000.jsonl").read_text().splitlines()
    assert sum('"attempt": 0' in line for line in lines) == 2


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ledger" / "summary.json").read_text())


def test_seen_and_quarantined_are_what_was_planned_over_an_interruption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path / "train", a=20, b=20, bad=(3, 7, 11))
    options: dict[str, Any] = {"max_bad_fraction": 1.0}
    fit(tmp_path / "whole", make_data(shards, **options), max_steps=9)
    whole = summary_of(tmp_path / "whole")
    assert (whole["planned"], whole["seen"] + whole["quarantined"]) == (36, 36)
    assert 3 <= whole["quarantined"] <= 6
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    # Two steps more than the checkpoint that is resumed from: they are done again, and count once.
    fit(tmp_path / "cut", make_data(shards, **options), max_steps=5, enable_checkpointing=True, callbacks=callbacks)
    saved = str(tmp_path / "ckpt" / "step=3.ckpt")
    with caplog.at_level("INFO"):
        fit(tmp_path / "cut", make_data(shards, **options), ckpt_path=saved, max_steps=9)
    resumed = summary_of(tmp_path / "cut")
    assert {name: resumed[name] for name in ("planned", "seen", "quarantined", "domains")} == {
        name: whole[name] for name in ("planned", "seen", "quarantined", "domains")
    }
    of_a = whole["domains"]["a"]
    assert f"  a: 18 samples planned = {of_a['seen']} seen + {of_a['quarantined']} quarantined" in caplog.text


def test_a_batch_the_model_broke_off_does_not_count(tmp_path: Path) -> None:
    class Failing(Recorder):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    shards = write_shards(tmp_path / "train", a=20)
    callbacks: list[Callback] = [ModelCheckpoint(tmp_path / "ckpt", filename="x", save_on_exception=True)]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(Failing(), datamodule=make_data(shards))
    [saved] = (tmp_path / "ckpt").glob("*.ckpt")
    state = torch.load(saved, weights_only=True)["ShardDataModule"]
    assert (state["consumed"], state["ledger"]) == (12, {"a": [12, 0]})
    assert not (tmp_path / "ledger" / "summary.json").exists()
    resumed = fit(tmp_path, make_data(shards), ckpt_path=str(saved))
    assert resumed.seen == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert summary_of(tmp_path)["planned"] == 20


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 12),
        ({"max_epochs": 2, "limit_train_batches": 3}, 24),
        ({"max_epochs": 3, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 18),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 48),
    ],
)
def test_the_books_balance_however_an_epoch_ends(tmp_path: Path, options: dict[str, Any], planned: int) -> None:
    data = make_data(write_shards(tmp_path / "train", a=24))
    model = fit(tmp_path, data, **options)
    assert [place for batch in model.seen for place in batch] == list(range(planned))
    assert summary_of(tmp_path)["planned"] == data.consumed == planned


def test_another_sampler_in_the_plans_place_stops_training(tmp_path: Path) -> None:
    class Other(ShardDataModule):
        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            return torch.utils.data.DataLoader(
                loader.dataset, batch_sampler=[[0, 1, 2, 3], [8, 9, 10, 11]], collate_fn=loader.collate_fn
            )

    data = Other(write_shards(tmp_path / "train", a=24), img_size_px=16, global_batch_size=4, num_workers=0)
    with pytest.raises(DataError, match="position 4 was due, and the model stands at 8"):
        fit(tmp_path, data)


def domains_of(data: ShardDataModule, model: Recorder) -> list[str]:
    rows = [row for batch in model.rows for row in batch]
    return ["ab"[int(data.train_index.domain_ids[row])] for row in rows]


def test_weights_change_at_their_step_and_the_run_resumes_over_it(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=30, b=30)
    changes = [WeightChange(3, {"a": 3, "b": 1}), WeightChange(6, {"a": 0.5, "b": 0.5})]
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    data = make_data(shards, weight_changes=changes)
    whole = fit(tmp_path, data, max_steps=9, enable_checkpointing=True, callbacks=callbacks)
    named = domains_of(data, whole)
    assert [named[12 * part : 12 * part + 12].count("a") for part in range(3)] == [6, 9, 6]
    for done in (2, 3, 4, 7):
        again = make_data(shards, weight_changes=changes[: 1 if done < 5 else 2])
        resumed = fit(tmp_path, again, ckpt_path=str(tmp_path / "ckpt" / f"step={done}.ckpt"), max_steps=6)
        assert resumed.rows == whole.rows[done:6]
    with pytest.raises(DataError, match="differs in its weights, in steps that were done"):
        fit(tmp_path, make_data(shards), ckpt_path=str(tmp_path / "ckpt" / "step=4.ckpt"))


def test_a_change_counts_steps_of_the_new_batch_size_after_a_resume(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=40, b=40)
    changes = [WeightChange(4, {"a": 5, "b": 1})]
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": callbacks}
    fit(tmp_path, make_data(shards, weight_changes=changes), max_steps=2, **options)
    data = make_data(shards, weight_changes=changes, global_batch_size=6)
    resumed = fit(tmp_path, data, ckpt_path=str(tmp_path / "ckpt" / "step=2.ckpt"), max_steps=6)
    assert [batch[0] for batch in resumed.seen] == [8, 14, 20, 26]
    named = domains_of(data, resumed)
    assert [named[12 * part : 12 * part + 12].count("a") for part in range(2)] == [6, 10]
    assert summary_of(tmp_path)["planned"] == 32


@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")
def test_new_data_go_on_only_when_they_are_allowed(tmp_path: Path) -> None:
    shards, more = write_shards(tmp_path / "train", a=12, b=9), write_shards(tmp_path / "more", a=12, b=9, c=8)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt", every_n_train_steps=1)]
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": callbacks}
    first = fit(tmp_path, make_data(shards), max_steps=2, **options)
    saved = str(tmp_path / "ckpt" / "step=2.ckpt")
    with pytest.raises(DataError, match=r"differs in its fingerprint.*set data.allow_new_data to true"):
        fit(tmp_path, make_data(more), ckpt_path=saved)
    data = make_data(more, allow_new_data=True)
    options["callbacks"] = [checkpoint_at(tmp_path / "later", every_n_train_steps=1)]
    second = fit(tmp_path, data, ckpt_path=saved, max_steps=6, **options)
    of_a = [row for batch in first.rows + second.rows for row in batch if row < 12]
    assert len(of_a) == len(set(of_a)) >= 8
    assert summary_of(tmp_path)["domains"].keys() == {"a", "b", "c"}
    assert [segment["start"] for segment in summary_of(tmp_path)["position"]["segments"]] == [0, 8]
    # The run goes on on the new data without the flag, and not back to the old ones.
    third = fit(tmp_path, make_data(more), ckpt_path=str(tmp_path / "later" / "step=4.ckpt"), max_steps=6)
    assert third.rows == second.rows[2:]
    with pytest.raises(DataError, match="differs in its fingerprint"):
        fit(tmp_path, make_data(shards), ckpt_path=str(tmp_path / "later" / "step=4.ckpt"))


def test_the_samples_of_each_step_are_recorded_where_this_is_wanted(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=24), record_samples=True)
    model = fit(tmp_path, data, accumulate_grad_batches=2, max_steps=3)
    with (tmp_path / "ledger" / "samples-rank-00000.csv").open() as stream:
        lines = [tuple(map(int, line.values())) for line in csv.DictReader(stream)]
    places = [place for batch in model.seen for place in batch]
    rows = [row for batch in model.rows for row in batch]
    assert lines == [(place // 4, place, row) for place, row in zip(places, rows, strict=True)]


def test_validation_of_a_checkpoint_asks_nothing_of_the_training_data(tmp_path: Path) -> None:
    shards, other = write_shards(tmp_path / "train", a=12), write_shards(tmp_path / "other", a=7)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt")]
    fit(tmp_path, make_data(shards), max_steps=1, enable_checkpointing=True, callbacks=callbacks)
    model, saved = Recorder(), str(tmp_path / "ckpt" / "step=1.ckpt")
    make_trainer(tmp_path).validate(model, datamodule=make_data(other, val=other), ckpt_path=saved, verbose=False)
    assert model.val_rows == list(range(7))


def test_too_many_bad_samples_stop_training(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=150, bad=tuple(range(0, 150, 10))), max_bad_fraction=0.02)
    with pytest.raises(DataError, match="'a' has .* bad images"):
        fit(tmp_path, data)


def test_validation_sees_every_image_once_in_order(tmp_path: Path) -> None:
    train = write_shards(tmp_path / "train", b=4)
    data = make_data(train, val=write_shards(tmp_path / "val", a=3, b=4), val_batch_size_per_device=3)
    model = Recorder()
    make_trainer(tmp_path).validate(model, datamodule=data, verbose=False)
    assert model.val_rows == list(range(7))
    assert data.domains == ("b", "a")
    [*batches] = data.val_dataloader()
    assert [number for batch in batches for number in batch["domain"].tolist()] == [1] * 3 + [0] * 4


def test_calibration_batches_are_the_first_of_the_plan_and_change_nothing(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=12, bad=(1,))

    class Calibrating(Recorder):
        def on_fit_start(self) -> None:
            state = data.state_dict(), torch.get_rng_state()
            self.batches = list(data.calibration_batches(4))
            assert data.state_dict() == state[0]
            assert torch.equal(torch.get_rng_state(), state[1])
            assert not data.ledger.counts()

    data = make_data(shards, max_bad_fraction=1)
    model = Calibrating()
    make_trainer(tmp_path).fit(model, datamodule=data)
    assert [batch["index"].tolist() for batch in model.batches] == [[4 * n + k for k in range(4)] for n in range(4)]
    assert [batch["row"].tolist() for batch in model.batches[:3]] == model.rows
    assert all(isinstance(value, Tensor) for value in model.batches[0].values())


def test_the_module_works_without_a_trainer(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=12))
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.domains
    data.prepare_data()
    data.setup("fit")
    assert len(data.fingerprint) == 64
    assert [batch["index"].tolist() for batch in data.train_dataloader()][1] == [4, 5, 6, 7]
    data.load_state_dict(data.state_dict() | {"consumed": 8, "step": 2})
    assert next(iter(data.train_dataloader()))["index"].tolist() == [8, 9, 10, 11]
    assert data.val_dataloader() == []


def test_fewer_samples_than_a_batch_repeat_within_it(tmp_path: Path) -> None:
    model = fit(tmp_path, make_data(write_shards(tmp_path / "train", a=3)))
    assert model.seen == [[0, 1, 2, 3]]
    assert set(model.rows[0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"global_batch_size": 5}, {"accumulate_grad_batches": 2}, "data.global_batch_size 5 is no multiple of 1"),
        ({"samples_per_epoch": 3}, {}, "data.samples_per_epoch 3 is below"),
        ({"weights": {"a": 1, "x": 1}}, {}, "x; the training data has a"),
        ({"seed": -1}, {}, "data.seed is -1"),
        ({}, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler"),
    ],
)
def test_settings_that_cannot_work_name_their_key(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    data = make_data(write_shards(tmp_path / "train", a=12), **options)
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, data, **trainer)


@pytest.mark.parametrize(
    "options", [{"img_size_px": 0}, {"global_batch_size": 0}, {"num_workers": -1}, {"max_bad_fraction": 2.0}]
)
def test_values_out_of_range_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(options))} is"):
        make_data("somewhere", **options)


def test_missing_shards_name_the_key(tmp_path: Path) -> None:
    data = make_data(write_shards(tmp_path / "train", a=4), val=str(tmp_path / "nothing-*.tar"))
    with pytest.raises(DataError, match="data.val: no shard matches"):
        data.prepare_data()
