from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from distill.alignment import AlignmentConfig
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.callbacks.initial_weights import SaveInitialWeights
from distill.callbacks.last_checkpoint import LastCheckpoint
from distill.callbacks.throughput import Throughput
from distill.checkpoint import assign_strictly, read_checkpoint
from distill.errors import ConfigError, WeightsError
from distill.low_resolution import LowResolution
from distill.optim import OptimConfig
from distill.task import DistillationTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class RandomImages(LightningDataModule):
    domains = ("natural", "ocr")
    has_fixed_views = True
    img_size_px = 32

    def __init__(self, count: int = 16, batch: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.samples = [
            {"images": image, "domain": torch.tensor(i % 2), "row": torch.tensor(i)} for i, image in enumerate(images)
        ]
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, self.batch)

    val_dataloader = train_dataloader

    def calibration_batches(self, count: int):
        return [batch for _, batch in zip(range(count), self.train_dataloader(), strict=False)]


def task(make_encoder, **changes) -> DistillationTask:
    torch.manual_seed(3)
    arguments = {
        "teachers": {"big": make_encoder(20)},
        "students": {"small": make_encoder(8)},
        "alignments": [AlignmentConfig("small", "big", num_layers=2)],
        "optimizer": OptimConfig(lr_student=1e-2, lr_heads=1e-2),
    }
    return DistillationTask(**(arguments | changes))


def fit(module: DistillationTask, folder: Path, steps: int = 8, callbacks=(), settings=None, **arguments) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[
            LastCheckpoint(folder / "checkpoints"),
            SaveInitialWeights(),
            Throughput(every_n_steps=2),
            *callbacks,
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"num_sanity_val_steps": -1} | (settings or {})),
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=RandomImages(), **arguments)
    return trainer


def test_training_lowers_the_loss_and_raises_the_validation_skill(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    trainer = fit(module, tmp_path, steps=40)
    assert module.initial_metrics["val/cosine"] < trainer.callback_metrics["val/cosine"].item() - 0.2
    with (tmp_path / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    losses = [float(row["loss/total"]) for row in rows if row["loss/total"]]
    assert losses[-1] < losses[0] - 0.2
    initial = next(row for row in rows if row["val/cosine/natural"])
    assert initial["step"] == "0"
    assert float(initial["val/cosine/natural"]) == pytest.approx(module.initial_metrics["val/cosine/natural"])
    for column in (
        "val/cosine_layer_-1/ocr",
        "val/baseline/ocr",
        "val/skill",
        "loss/layer_-2",
        "throughput/images_per_s",
    ):
        assert any(row.get(column) for row in rows), column


def test_the_teacher_is_in_no_checkpoint_optimizer_copy_or_registry(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    trainer = fit(module, tmp_path)
    teacher = module.teachers["big"]
    teacher_ids = {id(p) for p in teacher.parameters()}
    assert not teacher_ids & {id(p) for p in module.parameters()}
    assert not teacher_ids & {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert {key.split(".")[0] for key in state} == {"students", "alignments"}
    assert copy.deepcopy(module).teachers is module.teachers


def test_the_teacher_stays_frozen_in_eval_and_unchanged(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    before = {key: value.clone() for key, value in module.teachers["big"].state_dict().items()}
    fit(module, tmp_path)
    teacher = module.teachers["big"]
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_an_ema_callback_neither_copies_nor_saves_the_teacher(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    ema = EMAWeightAveraging(decay=0.9)
    fit(module, tmp_path, callbacks=[ema])
    averaged = ema._average_model.module
    assert averaged.teachers is module.teachers
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert not [key for key in state if "teacher" in key]


def test_a_checkpoint_that_lacks_one_student_tensor_is_refused(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    fit(module, tmp_path)
    file = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["state_dict"]["students.small.blocks.1.bias"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)
    with pytest.raises(RuntimeError, match=r"students\.small\.blocks\.1\.bias"):
        fit(task(make_encoder), tmp_path / "again", ckpt_path=file)
    state = {k.removeprefix("students.small."): v for k, v in checkpoint["state_dict"].items() if "students" in k}
    with pytest.raises(WeightsError, match=r"1 missing \(first: blocks\.1\.bias\)"):
        assign_strictly(make_encoder(8), state, file)


def test_the_initial_student_is_kept(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    before = {key: value.clone() for key, value in module.students["small"].state_dict().items()}
    fit(module, tmp_path)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "initial" / "small.safetensors")
    assert all(torch.equal(before[key], value) for key, value in kept.items())
    assert not all(torch.equal(kept[key], value) for key, value in module.students["small"].state_dict().items())


def test_a_teacher_is_run_once_a_batch_however_many_students_learn_from_it(make_encoder) -> None:
    module = task(
        make_encoder,
        students={"a": make_encoder(8), "b": make_encoder(4)},
        alignments=[AlignmentConfig("a", "big", num_layers=2), AlignmentConfig("b", "big", num_layers=3)],
    )
    values = module._step({"images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "row": torch.arange(2)})
    assert module.teachers["big"].forward_count == 1
    assert "loss/a/big/layer_-2" in values
    assert "loss/b/big/layer_-3" in values


def test_micro_batches_change_nothing_but_memory(make_encoder) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    whole, parts = task(make_encoder), task(make_encoder, teacher_micro_batch=2)
    for (p, q), (r, s) in zip(
        whole.teachers.forward_hidden_states(images, {"big": 2})["big"],
        parts.teachers.forward_hidden_states(images, {"big": 2})["big"],
        strict=True,
    ):
        assert torch.allclose(p, r, atol=1e-6)
        assert torch.allclose(q, s, atol=1e-6)


def test_standardisers_are_calibrated_before_the_first_step_and_saved(make_encoder, tmp_path: Path) -> None:
    from distill.losses import MSE

    alignment = AlignmentConfig("small", "big", num_layers=2, loss=MSE(), standardise="mean_std")
    module = task(make_encoder, alignments=[alignment])
    fit(module, tmp_path, steps=2)
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert bool(state["alignments.0.standardisers.1.is_calibrated"])


def test_targets_are_turned_to_the_untrained_student_which_stays_as_it_is(make_encoder, tmp_path: Path) -> None:
    alignment = AlignmentConfig("small", "big", num_layers=2, head="none", standardise="procrustes")
    student = make_encoder(8)
    student.norm = torch.nn.BatchNorm2d(3)  # its running statistics would tell a forward in training mode
    student.frozen = torch.nn.Dropout().eval()
    forward = student.forward_hidden_states
    student.forward_hidden_states = lambda x, n: forward((255 * student.norm(x.float() / 255).sigmoid()).byte(), n)
    module = task(make_encoder, students={"small": student}, alignments=[alignment])
    seen: list[int] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(int(student.norm.num_batches_tracked))
            assert student.norm.training
            assert not student.frozen.training

    fit(module, tmp_path, steps=2, callbacks=[Look()], settings={"num_sanity_val_steps": 0})
    assert seen == [0]
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert state["alignments.0.standardisers.1.rotation"].shape == (8, 20)
    assert not torch.equal(state["alignments.0.standardisers.1.rotation"], torch.eye(8, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignments": [AlignmentConfig("nobody", "big")]}, "student 'nobody'; the recipe has small"),
        ({"alignments": [AlignmentConfig("small", "x")]}, "teacher 'x'; the recipe has big"),
        ({"teachers": {}}, "teachers is empty"),
        ({"teachers": {"big": object()}}, "not a torch.nn.Module"),
    ],
)
def test_a_recipe_that_names_nobody_is_refused(make_encoder, changes, message) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        task(make_encoder, **changes)


def test_an_encoder_nobody_uses_is_refused(make_encoder) -> None:
    with pytest.raises(ConfigError, match="No entry of model.alignments names idle"):
        task(make_encoder, teachers={"big": make_encoder(20), "idle": make_encoder(4)})


def test_missing_weights_are_named_and_nothing_is_trained(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)

    def missing() -> None:
        raise FileNotFoundError("weights/model.safetensors is missing. Download it.")

    module.teachers["big"].load_weights = missing
    with warnings.catch_warnings(), pytest.raises(WeightsError, match=r"teacher 'big'.*weights/model\.safetensors"):
        warnings.simplefilter("ignore")
        fit(module, tmp_path)


def test_a_full_disk_is_named_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(2)}}, path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.ones(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]


def test_modules_registered_are_students_and_alignments_only(make_encoder) -> None:
    names = {name for name, _ in task(make_encoder).named_children()}
    assert names == {"students", "alignments"}
    assert isinstance(task(make_encoder).students, nn.ModuleDict)


def test_remembered_teacher_states_train_the_same_student_with_one_teacher_forward_an_image(
    make_encoder, tmp_path: Path
) -> None:
    online, remembering = task(make_encoder), task(make_encoder, teacher_cache_gib=0.1)
    a, b = fit(online, tmp_path / "online", steps=12), fit(remembering, tmp_path / "remembering", steps=12)
    assert online.teachers["big"].forward_count > remembering.teachers["big"].forward_count == 2 * 4
    assert len(remembering.memory) == 2 * 16
    assert a.callback_metrics["val/cosine"].item() == b.callback_metrics["val/cosine"].item()


def test_a_full_memory_computes_the_rest(make_encoder) -> None:
    module = task(make_encoder)
    module.memory.limit_bytes = 2 * 2 * (1 + 16) * 20 * 4  # two images of two float32 layers
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = {"images": images, "row": torch.arange(4)}
    first, second = module._step(batch), module._step(batch)
    assert len(module.memory) == 2
    assert torch.equal(first["loss/total"], second["loss/total"])


def test_remembering_changing_views_is_refused(make_encoder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(RandomImages, "has_fixed_views", False)
    with pytest.raises(ConfigError, match="data.augment"):
        fit(task(make_encoder, teacher_cache_gib=0.1), tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_under_a_fused_optimizer(make_encoder, tmp_path: Path, precision: str) -> None:
    from lightning.pytorch.callbacks import Callback

    norms = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            norms.append(torch.stack(gradients).norm().item())

    settings = {"gradient_clip_val": 1e-3, "precision": precision}
    module = task(make_encoder)
    clipped: list[float] = []
    original = module.configure_gradient_clipping

    def spy(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        original(optimizer, gradient_clip_val, gradient_clip_algorithm)
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        clipped.append(torch.stack(gradients).norm().item())

    module.configure_gradient_clipping = spy
    fit(module, tmp_path, steps=3, callbacks=[Norm()], settings=settings)
    assert min(norms) > 1e-3
    assert max(clipped) <= 1e-3 * 1.01


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"check_val_every_n_epoch": 2}, 12), ({"check_val_every_n_epoch": None, "val_check_interval": 3}, 7)],
)
def test_the_last_checkpoint_holds_the_last_step(make_encoder, tmp_path: Path, settings, steps: int) -> None:
    fit(task(make_encoder), tmp_path, steps=steps, settings=settings)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == steps


def test_a_partial_sanity_check_gives_no_initial_values(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder)
    fit(module, tmp_path, steps=1, settings={"num_sanity_val_steps": 2})
    assert module.initial_metrics == {}


def test_weights_are_read_on_the_cpu_whatever_the_default_device(make_encoder) -> None:
    module = task(make_encoder)
    devices = []
    module.students["small"].load_weights = lambda: devices.append(torch.zeros(1).device.type)
    module.teachers["big"].load_weights = lambda: devices.append(torch.zeros(1).device.type)
    with torch.device("meta"):
        module.configure_model()
    assert devices == ["cpu", "cpu"]


def test_students_see_small_images_first_and_teachers_whole_ones(make_encoder, tmp_path: Path) -> None:
    module = task(make_encoder, low_resolution=LowResolution(16, 0.5))
    seen: dict[str, list[int]] = {"small": [], "big": []}
    for name, encoder in (("small", module.students["small"]), ("big", module.teachers["big"])):

        def look(images: torch.Tensor, count: int, name=name, forward=encoder.forward_hidden_states):
            seen[name].append(images.shape[-1])
            return forward(images, count)

        encoder.forward_hidden_states = look
    fit(module, tmp_path, steps=8, settings={"num_sanity_val_steps": 0, "limit_val_batches": 0})
    assert seen["small"] == [16] * 4 + [32] * 4
    assert set(seen["big"]) == {32}
    seen["small"].clear()
    other = task(make_encoder, low_resolution=LowResolution(16, 0.5))
    trainer = fit(other, tmp_path / "other", steps=3, settings={"num_sanity_val_steps": 0, "limit_val_batches": 0})
    assert other.low_resolution_steps == 2  # of the three steps that this run has
    assert trainer.global_step == 3


def test_a_resumed_run_goes_on_at_the_resolution_that_is_due(make_encoder, tmp_path: Path) -> None:
    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    settings = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    fit(task(make_encoder, low_resolution=LowResolution(16, 0.5)), tmp_path, callbacks=[Keep()], settings=settings)
    module = task(make_encoder, low_resolution=LowResolution(16, 0.5))
    seen: list[int] = []
    forward = module.students["small"].forward_hidden_states
    module.students["small"].forward_hidden_states = lambda x, n: (seen.append(x.shape[-1]), forward(x, n))[1]
    fit(module, tmp_path / "resumed", settings=settings, ckpt_path=tmp_path / "three.ckpt")
    assert seen == [16] + [32] * 4


def test_a_small_image_is_an_average_of_the_whole_one() -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[..., ::4] = 255  # between the columns that a filter without antialiasing reads
    small = LowResolution(8, 0.5).shrink(images)
    assert (small[..., 1:-1] - 0.25).abs().max() < 0.05
    assert torch.equal(LowResolution(16, 0.5).shrink(torch.ones(1, 3, 32, 32)), torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("size", "fraction", "message"),
    [
        (16, 0.0, "fraction is 0.0; it must lie between 0 and 1"),
        (16, 1.0, "set data.img_size_px"),
        (0, 0.5, "img_size_px is 0; it must be at least 1"),
        (32, 0.5, "must be below data.img_size_px, 32"),
        (18, 0.5, "must be a multiple of 8, the student 'small'"),
    ],
)
def test_a_low_resolution_that_cannot_be_is_refused_by_key(make_encoder, tmp_path, size, fraction, message) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(task(make_encoder, low_resolution=LowResolution(size, fraction)), tmp_path, steps=1)


def test_domains_have_a_teacher_each_and_every_image_counts_the_same(make_encoder, tmp_path: Path) -> None:
    teachers = {"first": make_encoder(20), "second": make_encoder(20)}
    both = [
        AlignmentConfig("small", "first", num_layers=2, domains=["natural"]),
        AlignmentConfig("small", "second", num_layers=2, domains=["ocr"]),
    ]
    module = task(make_encoder, teachers=teachers, alignments=both)
    data = RandomImages()
    fit(module, tmp_path, steps=1)
    batch = next(iter(data.train_dataloader()))
    images = batch["images"]
    own = module.students["small"].forward_hidden_states(images, 2)
    losses = []
    for number in range(len(images)):
        alignment = module.alignments[int(batch["domain"][number])]
        teacher = teachers[alignment.config.teacher].forward_hidden_states(images, 2)
        mine = [[(p[number : number + 1], q[number : number + 1]) for p, q in layers] for layers in (own, teacher)]
        losses.append(alignment(*mine)["loss"])
    assert module._step(batch)["loss/total"].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    assert "val/small/first/cosine/natural" in module.initial_metrics
    assert "val/small/first/cosine/ocr" not in module.initial_metrics


def test_a_batch_without_an_image_of_its_domains_gives_zero_with_gradients_for_all(make_encoder, tmp_path) -> None:
    module = task(make_encoder, alignments=[AlignmentConfig("small", "big", num_layers=2, domains=["ocr"])])
    fit(module, tmp_path, steps=1)
    batch = dict(next(iter(RandomImages().train_dataloader())))
    batch["domain"] = torch.zeros_like(batch["domain"])
    module.zero_grad()
    loss = module._step(batch)["loss/total"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.alignments.parameters())
    assert module.students["small"].patch.weight.grad is not None


def test_statistics_are_of_the_alignments_own_domains(make_encoder, tmp_path: Path) -> None:
    alignment = AlignmentConfig("small", "big", num_layers=1, standardise="mean_std", domains=["ocr"])
    module = task(make_encoder, alignments=[alignment])
    fit(module, tmp_path, steps=1)
    batches = list(RandomImages().train_dataloader())
    images = torch.cat([batch["images"][batch["domain"] == 1] for batch in batches])
    tokens = module.teachers.encoder("big").forward_hidden_states(images, 1)[0][1].flatten(0, 2)
    assert torch.allclose(module.alignments[0].standardisers[0].mean, tokens.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"), [(["chart"], "domains names chart; the data have natural, ocr"), ([], "none")]
)
def test_unknown_domains_are_refused(make_encoder, tmp_path: Path, names, message) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(task(make_encoder, alignments=[AlignmentConfig("small", "big", num_layers=1, domains=names)]), tmp_path)
