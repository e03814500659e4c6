"""A step with a value that is not finite changes neither parameters nor optimiser state, and leaves a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.callbacks.non_finite import NonFiniteGuard
from distill.encoder import Layer
from distill.errors import TrainingError
from distill.finite import finite_samples

STEPS = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Step .* was skipped"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*"),
]


class Toy(LightningModule):
    """Two layers; `spoil` may change the loss of a step, `spoil_gradient` the gradients."""

    def __init__(self, spoil: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.spoil = spoil or (lambda _, loss: loss)
        self.teacher_is_finite: dict[str, Tensor] = {}
        self.bad_teacher_steps: set[int] = set()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        flags = torch.ones(len(batch["row"]), dtype=torch.bool)
        flags[1] = self.global_step not in self.bad_teacher_steps
        self.teacher_is_finite = {"big": flags}
        return self.spoil(self.global_step, self.net(batch["x"]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, whose state would keep a NaN for ever."""
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class History(Callback):
    """Keeps parameters and optimiser state after each step."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Copy them."""
        optimizer = trainer.optimizers[0]
        moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        self.states.append([tensor.detach().clone() for tensor in [*pl_module.parameters(), *moments]])


def fit(module: Toy, folder: Path, guard: NonFiniteGuard, *callbacks: Callback, **settings: Any) -> Trainer:
    """Train the toy for `STEPS` steps."""
    generator = torch.Generator().manual_seed(0)
    images = [{"x": torch.randn(4, generator=generator), "row": row, "index": 100 + row} for row in range(4 * STEPS)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guard, *callbacks],
        **{"gradient_clip_val": 1.0, **settings},
    )
    trainer.fit(module, DataLoader(images, batch_size=4))
    return trainer


def nan_at(*steps: int) -> Callable[[int, Tensor], Tensor]:
    """Return a spoiler that makes the loss of these steps NaN."""
    return lambda step, loss: loss * torch.nan if step in steps else loss


def test_a_skipped_step_leaves_parameters_and_optimizer_state_bit_equal(tmp_path: Path) -> None:
    history, guard = History(), NonFiniteGuard()
    fit(Toy(nan_at(3)), tmp_path, guard, history)
    assert guard.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(history.states[2], history.states[3], strict=True))
    assert not torch.equal(history.states[3][0], history.states[4][0])
    assert all(bool(tensor.isfinite().all()) for tensor in history.states[-1])


def test_the_record_names_step_values_and_samples(tmp_path: Path) -> None:
    fit(Toy(nan_at(3)), tmp_path, NonFiniteGuard())
    (line,) = (tmp_path / "non_finite" / "rank-0.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["rank"]) == (3, 0)
    assert record["not_finite"][0] == "loss"
    assert "gradient of net.0.weight" in record["not_finite"]
    assert [sample["row"] for sample in record["samples"]] == [12, 13, 14, 15]
    assert [sample["index"] for sample in record["samples"]] == [112, 113, 114, 115]


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path: Path) -> None:
    class Infinite(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 2:
                gradient = next(pl_module.parameters()).grad
                assert gradient is not None
                gradient[0, 0] = torch.inf

    guard = NonFiniteGuard()
    fit(Toy(), tmp_path, guard, Infinite())
    record = json.loads((tmp_path / "non_finite" / "rank-0.jsonl").read_text())
    assert record["not_finite"] == ["gradient of net.0.weight"]
    assert guard.skipped == 1


def test_a_teacher_that_is_not_finite_is_named_with_its_sample_though_loss_and_gradients_are(tmp_path: Path) -> None:
    module, history = Toy(), History()
    module.bad_teacher_steps = {4}
    fit(module, tmp_path, NonFiniteGuard(), history)
    record = json.loads((tmp_path / "non_finite" / "rank-0.jsonl").read_text())
    assert record["not_finite"] == ["teacher big"]
    assert [sample["row"] for sample in record["samples"] if "not_finite_from" in sample] == [17]
    assert all(torch.equal(a, b) for a, b in zip(history.states[3], history.states[4], strict=True))


def test_a_step_of_several_batches_is_skipped_whole_and_lists_all_their_samples(tmp_path: Path) -> None:
    module = Toy(nan_at(1))
    guard = NonFiniteGuard()
    fit(module, tmp_path, guard, accumulate_grad_batches=2, max_epochs=1)
    record = json.loads((tmp_path / "non_finite" / "rank-0.jsonl").read_text())
    assert [sample["row"] for sample in record["samples"]] == list(range(8, 16))
    assert guard.skipped == 1


def test_too_many_in_a_row_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 steps in a row were not finite \(loss, .*max_in_a_row"):
        fit(Toy(nan_at(2, 3, 4, 5)), tmp_path, NonFiniteGuard(max_in_a_row=3))


def test_skipped_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_in_a_row=2)
    trainer = fit(Toy(nan_at(1, 3, 5)), tmp_path, guard)
    assert (guard.skipped, guard.in_a_row) == (3, 0)
    assert trainer.callback_metrics["non_finite/skipped"] == 3


def test_the_counts_go_on_after_a_resume() -> None:
    first, second = NonFiniteGuard(), NonFiniteGuard()
    first.skipped, first.in_a_row = 7, 2
    second.load_state_dict(first.state_dict())
    assert (second.skipped, second.in_a_row) == (7, 2)


def test_infinite_gradients_are_left_to_a_gradient_scaler(tmp_path: Path) -> None:
    class Infinite(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 2:
                gradient = next(pl_module.parameters()).grad
                assert gradient is not None
                gradient[0, 0] = torch.inf

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard, history = NonFiniteGuard(), History()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(Toy(), tmp_path, guard, Infinite(), history, plugins=[plugin])
    assert guard.skipped == 0
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(history.states[1], history.states[2], strict=True))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("what", ["loss", "teacher big"])
def test_a_bad_step_with_a_gradient_scaler_is_skipped_whoever_takes_the_scale_away(
    tmp_path: Path, fused: bool, what: str
) -> None:
    class Scaled(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=fused)

    module = Scaled(nan_at(3)) if what == "loss" else Scaled()
    module.bad_teacher_steps = {3} if what != "loss" else set()
    guard, history = NonFiniteGuard(), History()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(module, tmp_path, guard, history, plugins=[plugin], gradient_clip_val=None)
    record = json.loads((tmp_path / "non_finite" / "rank-0.jsonl").read_text())
    assert record["not_finite"] == [what]
    assert guard.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(history.states[2], history.states[3], strict=True))
    assert not torch.equal(history.states[3][0], history.states[4][0])
    assert all(bool(tensor.isfinite().all()) for tensor in history.states[-1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_only_the_sample_with_a_bad_value_is_not_finite(value: float) -> None:
    empty = torch.zeros(3, 0, 4)
    layers: list[Layer] = [(torch.ones(3, 1, 4), torch.ones(3, 2, 2, 4)), (empty, torch.ones(3, 2, 2, 4))]
    assert finite_samples(layers).tolist() == [True, True, True]
    layers[1][1][2, 1, 0, 3] = value
    assert finite_samples(layers).tolist() == [True, True, False]
