"""The data module under a real Trainer: batches, position, resume, ledger."""

from __future__ import annotations

import io
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
        with wds.TarWriter(str(folder / f"{domain}-000000.tar")) as writer:
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


def test_another_global_batch_size_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", a=24)
    callbacks: list[Callback] = [checkpoint_at(tmp_path / "ckpt")]
    fit(tmp_path, make_data(shards), max_steps=3, enable_checkpointing=True, callbacks=callbacks)
    data = make_data(shards, global_batch_size=6)
    resumed = fit(tmp_path, data, ckpt_path=str(tmp_path / "ckpt" / "step=3.ckpt"), max_steps=5)
    assert resumed.seen == [[12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23]][: len(resumed.seen)]
    assert data.state_dict()["consumed"] == 12 + 6 * len(resumed.seen)


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
    data.load_state_dict(data.state_dict() | {"consumed": 8})
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
