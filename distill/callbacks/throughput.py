"""Images a second, TFLOP/s and their share of what the device can do, in the progress bar and the logs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from distill.accelerators import GIB, measured_tflops, recognise_accelerator
from distill.errors import ConfigError
from distill.step_meter import FlopMeter, StepParts


class Throughput(Callback):
    """Logs `throughput/images_per_s` over all devices, and `throughput/tflops` and `throughput/mfu` of one.

    They are means over the steps between two logged ones, data loading included and validation left out. Operations are
    counted, as `distill plan` counts them, while the first batch of each epoch runs, and the first one after
    `model.low_resolution`: a teacher whose states are remembered or cached does not count. What gradient checkpointing
    does a second time does not count either. MFU is the share of the device's peak by its data sheet, or, on a CPU and
    on devices that are not in `distill.accelerators`, of what a matrix product was measured to reach when training
    began.

    Args:
        every_n_steps: training batches between two measurements.
        ceiling_tflops: what MFU is a share of, in 10**12 operations a second of one device; null finds it as above.
        tflop_per_image: operations an image in 10**12, as `distill plan` prints them; null counts them. Needed for
            encoders under torch.compile, which cannot be counted while they run.

    Raises:
        ConfigError: an argument is no positive number.
    """

    def __init__(
        self, every_n_steps: int = 10, ceiling_tflops: float | None = None, tflop_per_image: float | None = None
    ) -> None:
        for name, value in {"ceiling_tflops": ceiling_tflops, "tflop_per_image": tflop_per_image}.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"Throughput.{name} is {value}; it must be a number above 0, or null.")
        self.every_n_steps, self.ceiling_tflops, self.tflop_per_image = every_n_steps, ceiling_tflops, tflop_per_image
        self._images = 0
        self._seconds = 0.0
        self._started = 0.0
        self._counted_tflop = tflop_per_image
        self._parts = StepParts()
        self._meter: FlopMeter | None = None
        self._counting = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what MFU is a share of, on the process that logs it."""
        if self.ceiling_tflops is None and trainer.is_global_zero:
            dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
            self.ceiling_tflops = find_ceiling(pl_module.device, dtype)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it still runs from the batch before (its data loading counts)."""
        if not self._started:
            self._started = time.perf_counter()
        is_larger = 0 < getattr(pl_module, "low_resolution_steps", 0) == trainer.global_step
        is_due = batch_idx == 0 or is_larger or self._counted_tflop is None  # a resumed epoch does not begin at 0
        if is_due and self.tflop_per_image is None and trainer.is_global_zero:
            self._begin_counting(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Tell forward from backward."""
        self._parts.begin_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell backward from what follows."""
        self._parts.end_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and log every `every_n_steps`."""
        if self._meter is not None:
            self._counted_tflop = self._meter.useful / len(batch["images"]) / 1e12
            self._end_counting()
        now = time.perf_counter()
        self._images += len(batch["images"]) * trainer.world_size
        self._seconds += now - self._started
        self._started = now
        if (batch_idx + 1) % self.every_n_steps == 0:
            rate = self._images / self._seconds
            pl_module.log("throughput/images_per_s", rate, prog_bar=True, rank_zero_only=True, batch_size=1)
            self._log_work(pl_module, rate / trainer.world_size)
            self._images, self._seconds = 0, 0.0

    def _log_work(self, pl_module: LightningModule, images_per_s: float) -> None:
        if self._counted_tflop and self.ceiling_tflops:
            tflops = images_per_s * self._counted_tflop
            pl_module.log("throughput/tflops", tflops, rank_zero_only=True, batch_size=1)
            pl_module.log("throughput/mfu", tflops / self.ceiling_tflops, rank_zero_only=True, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._started = 0.0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting in the middle of a batch."""
        self._end_counting()

    def _begin_counting(self, pl_module: LightningModule) -> None:
        task = cast(Any, pl_module)
        holder = getattr(task, "teachers", None)
        teachers = {name: holder[name] for name in holder.names()} if holder is not None else {}
        students: dict[str, nn.Module] = dict(getattr(task, "students", nn.ModuleDict()).items())
        if any(is_compiled(module) for module in (*teachers.values(), *students.values())):
            return
        self._parts = StepParts()
        self._meter = FlopMeter(self._parts)
        self._counting.enter_context(self._parts.watching(teachers, students))
        self._counting.enter_context(self._meter)

    def _end_counting(self) -> None:
        self._meter = None
        self._counting.close()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile works on any part of a module; a dispatch mode would keep it from compiling."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )


def find_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return what one device can do at most in 10**12 operations a second: by its data sheet, else measured.

    Args:
        device: of this machine.
        dtype: training computes in; data sheets are consulted for bfloat16 only.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        properties: Any = torch.cuda.get_device_properties(device)
        known = recognise_accelerator(str(properties.name), properties.total_memory / GIB)
        if known is not None:
            return known.peak_tflops
    return measured_tflops(device, dtype)
