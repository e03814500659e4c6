"""How a step is run rather than what it computes: kernels, micro-batches, compilation, teachers spread over ranks.

What is measured on a machine is measured once a run and kept in the checkpoint, since kernels round differently: a
resumed run takes the same ones and goes on with the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from lightning import Trainer
from torch import Tensor, nn

from distill.attention_probe import ChoosesAttention, Kernel, choose_attention
from distill.compilation import Compilation, compile_blocks
from distill.control_group import control_group
from distill.errors import ConfigError
from distill.frozen_teachers import FrozenTeachers
from distill.precision import AUTOCAST_DTYPES
from distill.teacher_sharding import TeacherSharding

Choices = dict[str, str | int]
MicroBatch = int | Literal["auto"] | None

MICRO_BATCH = "teacher_micro_batch"
MICRO_BATCH_PROBE_S = 1.0
"""CPU seconds that one image may take: beyond, single images are taken without measuring, as they are on small ones."""

MICRO_BATCH_ROUNDS = 3
MICRO_BATCH_MARGIN = 1.05
MAX_PROBED_IMAGES = 8


@dataclass
class EngineConfig:
    """How steps are run; none of it changes what is computed, but for rounding.

    Args:
        measure_attention: on a CPU, measure at the model's shape whether torch's fused attention or explicit products
            are faster, for encoders whose `attention` is auto; false takes what is faster on most machines.
        compile: "inductor" compiles the blocks of students and whole teachers by torch.compile when training begins,
            which takes from seconds to minutes; "aot_eager" only traces them; "off" does neither.
        teacher_sharding: "blocks" spreads the teachers' parameters over all ranks and gathers them block by block, for
            a teacher that does not fit each device beside the student; "none" gives each rank all of them.
    """

    measure_attention: bool = True
    compile: Compilation = "off"
    teacher_sharding: TeacherSharding = "none"


class Engine:
    """Applies an `EngineConfig` to a task's encoders.

    Args:
        config: what the recipe says.
        micro_batch: images a teacher sees at a time; "auto" measures it.
        remembers_states: whether the run remembers teachers' hidden states in memory.

    Attributes:
        choices: what was measured, by what it is for; kept in checkpoints.
        micro_batch: the number that was given, or None.

    Raises:
        ConfigError: the settings contradict each other.
    """

    def __init__(self, config: EngineConfig, micro_batch: MicroBatch, *, remembers_states: bool) -> None:
        if config.teacher_sharding != "none" and remembers_states:
            raise ConfigError(
                "model.engine.teacher_sharding is blocks, for which all ranks have to run the teacher equally often, "
                "but model.teacher_cache_gib leaves out images that a rank remembers; set one of them to none or 0."
            )
        if config.teacher_sharding != "none" and micro_batch == "auto":
            raise ConfigError(
                "model.teacher_micro_batch is auto, which each rank measures, but model.engine.teacher_sharding is "
                "blocks, for which all have to do the same; give a number."
            )
        self.config, self.measures_micro_batch = config, micro_batch == "auto"
        self.micro_batch = None if micro_batch == "auto" else micro_batch
        self.choices: Choices = {}
        self._is_started = False

    def shard(self, teachers: FrozenTeachers) -> None:
        """Spread the teachers over the ranks, if the recipe says so; before weights are read."""
        if self.config.teacher_sharding == "blocks":
            teachers.shard()

    def start(
        self, trainer: Trainer, teachers: FrozenTeachers | None, students: nn.ModuleDict, device: torch.device
    ) -> None:
        """Choose kernels and micro-batch, and compile; once, with the weights read and on their device.

        Args:
            trainer: of the run; its data module tells the size of images and batches, if it has `img_size_px`.
            teachers: of the run; None where they do not run.
            students: of the run.
            device: of this rank.
        """
        if self._is_started:
            return
        self._is_started = True
        data, parts = cast(Any, trainer).datamodule, trainer.world_size * trainer.accumulate_grad_batches
        size = getattr(data, "img_size_px", None)
        if size is not None:
            batch = max(1, int(getattr(data, "global_batch_size", 1)) // parts)
            images = ImagesSeen(int(size), batch, AUTOCAST_DTYPES.get(str(trainer.precision)), device)
            if teachers is not None:
                self.choose_for_teachers(teachers, images)
            if self.config.measure_attention:
                for name, module in students.items():
                    self._choose(f"student {name}", module, images, trains=True)
        whole = teachers if teachers is not None and not teachers.is_sharded else None
        compiled = [whole[name] for name in whole.names()] if whole is not None else []
        for module in (*compiled, *students.values()):
            compile_blocks(module, self.config.compile)

    def choose_for_teachers(self, teachers: FrozenTeachers, images: ImagesSeen) -> None:
        """Choose the teachers' kernels, and how many images they see at a time if that is to be measured.

        Args:
            teachers: with their weights, on their device.
            images: what they will see; they run in their own dtype whatever the autocast.
        """
        if self.config.measure_attention:
            shown = replace(images, count=self.micro_batch or images.count, autocast_dtype=None)
            for name in teachers.names():
                self._choose(f"teacher {name}", teachers[name], shown, trains=False)
        if self.measures_micro_batch:
            teachers.micro_batch = self._micro_batch(teachers, images)

    def _choose(self, name: str, module: nn.Module, images: ImagesSeen, *, trains: bool) -> None:
        if not isinstance(module, ChoosesAttention) or (shape := module.attention_shape(images.size_px)) is None:
            return
        device, dtype = images.device, images.autocast_dtype or next(module.parameters()).dtype
        key = _attention_key(name, device, dtype)
        if key not in self.choices:
            kernel = choose_attention(shape, images=images.count, device=device, dtype=dtype, trains=trains)
            self.choices[key] = control_group().share(kernel)
        module.use_attention(cast(Kernel, self.choices[key]))

    def _micro_batch(self, teachers: FrozenTeachers, images: ImagesSeen) -> int | None:
        if images.device.type != "cpu":
            return None  # larger batches are faster there; memory is what a number given by hand is for
        key = f"{MICRO_BATCH} of {images.count}"
        if key not in self.choices:
            shape = (min(images.count, MAX_PROBED_IMAGES), 3, images.size_px, images.size_px)
            layers = dict.fromkeys(teachers.names(), 1)

            def forward(part: Tensor) -> object:
                return teachers.forward_hidden_states(part, layers)

            drawn = torch.zeros(shape, dtype=torch.uint8, device=images.device)
            self.choices[key] = control_group().share(fastest_micro_batch(forward, drawn))
        return int(self.choices[key])


def take_kernels(choices: Choices, teachers: FrozenTeachers, device: torch.device) -> None:
    """Have teachers run by kernels that were chosen before, by `Engine.choose_for_teachers` in another process.

    Args:
        choices: of that engine; a teacher, device or dtype that they do not tell keeps its usual kernel.
        teachers: with their weights.
        device: they run on.
    """
    for name in teachers.names():
        module = teachers[name]
        kernel = choices.get(_attention_key(f"teacher {name}", device, next(module.parameters()).dtype))
        if kernel is not None and isinstance(module, ChoosesAttention):
            module.use_attention(cast(Kernel, kernel))


def _attention_key(name: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"attention of {name} on {device.type} in {dtype}"


@dataclass(frozen=True)
class ImagesSeen:
    """What an encoder sees: images of a side in pixels, so many at a time, under an autocast or none, on a device."""

    size_px: int
    count: int
    autocast_dtype: torch.dtype | None
    device: torch.device


def fastest_micro_batch(forward: Callable[[Tensor], object], images: Tensor) -> int:
    """Return how many images at a time take the least CPU time; a larger number displaces a smaller by 5 %.

    Args:
        forward: runs the teachers on `[B, 3, H, W]`.
        images: `[B, 3, H, W]`, as many as a batch has, or fewer.
    """
    began = time.process_time()
    forward(images[:1])
    forward(images[:1])
    if time.process_time() - began > 2 * MICRO_BATCH_PROBE_S:
        return 1
    sizes = list(_powers_of_two(len(images)))
    least = dict.fromkeys(sizes, float("inf"))
    for _ in range(MICRO_BATCH_ROUNDS):
        for count in sizes:
            began = time.process_time()
            for part in images.split(count):
                forward(part)
            least[count] = min(least[count], time.process_time() - began)
    best = 1
    for count in sizes[1:]:
        if MICRO_BATCH_MARGIN * least[count] < least[best]:
            best = count
    return best


def _powers_of_two(highest: int) -> Iterator[int]:
    size = 1
    while size <= highest:
        yield size
        size *= 2
