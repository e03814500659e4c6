"""One training step of a recipe on fake tensors: the real code runs, nothing is computed and nothing allocated."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from distill.cache.memory import HiddenStateMemory
from distill.errors import ConfigError, DistillError
from distill.planner.memory_meter import BACKWARD, GRADIENTS, MemoryMeter
from distill.precision import AUTOCAST_DTYPES
from distill.step_meter import Direction, FlopMeter, StepParts
from distill.task import DistillationTask

DeviceType = Literal["cpu", "cuda"]
_CHANNELS = 3


def teacher_weights(name: str) -> str:
    """Return the purpose under which a teacher's weights are counted."""
    return f"weights of teacher {name}"


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch costs.

    Attributes:
        batch_size: its images.
        flops: operations by `(part, direction)`, see `distill.step_meter`.
        memory: for each phase ("teacher", "forward", "backward"), bytes by purpose at its highest instant.
        before_backward: bytes by purpose at the instant between forward and backward.
        target_bytes: of the teachers' hidden states of one image, in their own dtype, by teacher.
    """

    batch_size: int
    flops: Counter[tuple[str, Direction]]
    memory: dict[str, Counter[str]]
    before_backward: Counter[str]
    target_bytes: dict[str, int]


class FakeStep:
    """A task whose weights are fake tensors, ready to be stepped through at any batch size.

    The task is of no further use: its weights are gone.

    Args:
        task: built from a recipe; its weights need not be there.
        img_size_px: side of the images.
        device: which kind of device is planned for; it need not be there.
        precision: Lightning's name.
        keeps_gradients: whether gradients of an earlier micro-batch are there during the backward pass, as with
            `trainer.accumulate_grad_batches` above 1.

    Raises:
        ConfigError: the precision cannot be planned.
    """

    def __init__(
        self,
        task: DistillationTask,
        *,
        img_size_px: int,
        device: DeviceType,
        precision: str,
        keeps_gradients: bool = False,
    ) -> None:
        if precision not in AUTOCAST_DTYPES:
            raise ConfigError(
                f"trainer.precision {precision!r} cannot be planned; use one of {', '.join(AUTOCAST_DTYPES)}."
            )
        self.task, self.img_size_px = task, img_size_px
        self.device: DeviceType = device
        self.autocast_dtype = AUTOCAST_DTYPES[precision]
        self.keeps_gradients = keeps_gradients
        # Rows index the memory of hidden states, and fake rows have no values.
        task.memory = HiddenStateMemory(0)
        self._mode = FakeTensorMode()
        with self._mode:
            for module in self.modules().values():
                make_fake(module, torch.device(device))
        task.train()

    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold weights, by their purpose."""
        task = self.task
        teachers = {teacher_weights(name): task.teachers[name] for name in task.teachers.names()}
        students = {f"weights of student {name}": module for name, module in task.students.items()}
        return {**teachers, **students, "weights of heads": task.alignments}

    def run(self, batch_size: int, *, backward: bool = True) -> StepCost:
        """Return what a micro-batch of that size costs.

        Args:
            batch_size: its images.
            backward: whether to run the backward pass too, for which torch wants a device of that kind to be there.

        Raises:
            ConfigError: the images do not fit the encoders, or an encoder cannot run without values.
        """
        parts = StepParts()
        memory, flops = MemoryMeter(parts), FlopMeter(parts)
        task = self.task
        teachers = {name: task.teachers[name] for name in task.teachers.names()}
        target_bytes: dict[str, int] = {}
        try:
            with ExitStack() as stack:
                stack.enter_context(_pretending(self.device))
                stack.enter_context(_noting_targets(task, target_bytes))
                stack.enter_context(self._mode)
                self._enter_standing(memory)
                batch = self._batch(batch_size, memory)
                stack.enter_context(parts.watching(teachers, dict(task.students.items())))
                handles = self._follow_gradients(memory)
                stack.enter_context(memory)
                stack.enter_context(flops)
                before = self._step(batch, parts, memory, backward=backward)
                for handle in handles:
                    handle.remove()
        except DistillError:
            raise
        except Exception as error:  # whatever an encoder of the user's own does on tensors without values
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"The step cannot be planned, as it needs values of its tensors, or fails ({type(error).__name__}: "
                f"{reason}). Run one step of the recipe instead: distill fit ... --trainer.fast_dev_run 1."
            ) from error
        targets = {name: size // batch_size for name, size in target_bytes.items()}
        return StepCost(batch_size, flops.flops, memory.peaks, before, targets)

    def _step(self, batch: dict[str, Tensor], parts: StepParts, memory: MemoryMeter, *, backward: bool) -> Counter[str]:
        # Lightning's order: forward, then the gradients of the step before are freed, then backward.
        with _autocast(self.device, self.autocast_dtype):
            loss = self.task._step(batch)["loss/total"]  # pyright: ignore[reportPrivateUsage]
        if not self.keeps_gradients:
            self.task.zero_grad(set_to_none=True)
        before = memory.live.copy()
        if backward:
            parts.begin_backward()
            loss.backward()
            parts.end_backward()
        return before

    def _enter_standing(self, memory: MemoryMeter) -> None:
        for purpose, module in self.modules().items():
            for tensor in (*module.parameters(), *module.buffers()):
                memory.enter_weights(tensor, purpose)
        for parameter in self.trainable():
            parameter.grad = torch.empty_like(parameter)
            memory.enter(parameter.grad, GRADIENTS)

    def _batch(self, batch_size: int, memory: MemoryMeter) -> dict[str, Tensor]:
        side = self.img_size_px
        images = torch.empty(batch_size, _CHANNELS, side, side, dtype=torch.uint8, device=self.device)
        batch = {"images": images.contiguous(memory_format=torch.channels_last)}
        numbers = ("label", "domain", "row", "index", "substituted")
        batch |= {name: torch.empty(batch_size, dtype=torch.int64, device=self.device) for name in numbers}
        for tensor in batch.values():
            memory.enter(tensor, "batch")
        return batch

    def _follow_gradients(self, memory: MemoryMeter) -> list[Any]:
        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                memory.rename(parameter.grad, GRADIENTS)

        return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in self.trainable()]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        modules = (self.task.students, self.task.alignments)
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def make_fake(module: nn.Module, device: torch.device) -> None:
    """Put fake tensors in the place of a module's parameters and buffers; call it within a `FakeTensorMode`.

    An encoder that names a `dtype` gets its floating-point tensors in it, as it would load them.
    """
    own = getattr(module, "dtype", None)
    dtype = own if isinstance(own, torch.dtype) and own.is_floating_point else None
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            owner.register_parameter(name, cast(nn.Parameter, made[id(parameter)]))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, _fake_buffer(buffer, dtype, device))
    if isinstance(vars(module).get("is_loaded"), bool):
        cast(Any, module).is_loaded = True


def _fake_buffer(buffer: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    if buffer.dtype == torch.bool and buffer.ndim == 0:
        return torch.tensor(True)  # a flag that the step asks for: a fake constant keeps its value
    return torch.empty(
        buffer.shape, dtype=dtype if buffer.is_floating_point() and dtype else buffer.dtype, device=device
    )


def step_cost(task: DistillationTask, batch_size: int, *, device: DeviceType, **settings: Any) -> StepCost:
    """Return what a micro-batch costs on a device that need not be there.

    torch's autograd runs a backward pass on a GPU, fake or not, only where there is one. Without one the forward pass
    is taken on the GPU, and the backward pass in float32 on the CPU: its operations are the same, and what it needs
    beyond the forward pass's end is an upper bound under mixed precision.

    Args:
        task: as for `FakeStep`.
        batch_size: images.
        device: which kind.
        settings: of `FakeStep`.
    """
    if device == "cpu" or torch.cuda.is_available():
        return FakeStep(task, device=device, **settings).run(batch_size)
    forward = FakeStep(task, device=device, **settings).run(batch_size, backward=False)
    on_cpu: dict[str, Any] = {**settings, "precision": "32-true"}
    whole = FakeStep(task, device="cpu", **on_cpu).run(batch_size)
    flops = forward.flops.copy()
    flops.update({key: count for key, count in whole.flops.items() if key[1] != "forward"})
    backward = forward.before_backward.copy()
    backward[BACKWARD] += max(0, whole.memory["backward"].total() - whole.before_backward.total())
    memory = {**forward.memory, "backward": backward}
    return StepCost(batch_size, flops, memory, forward.before_backward, forward.target_bytes)


@contextmanager
def _noting_targets(task: DistillationTask, sizes: dict[str, int]) -> Generator[None]:
    """Write down how many bytes the hidden states of a batch have, by teacher."""
    teachers = cast(Any, task.teachers)
    forward = teachers.forward_hidden_states

    def noted(*arguments: Any, **settings: Any) -> Any:
        states = forward(*arguments, **settings)
        for name, layers in states.items():
            sizes[name] = sum(part.numel() * part.element_size() for layer in layers for part in layer)
        return states

    with mock.patch.object(teachers, "forward_hidden_states", noted):
        yield


@contextmanager
def _autocast(device: DeviceType, dtype: torch.dtype | None) -> Generator[None]:
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        yield


class _FusedAttention(TorchFunctionMode):
    """Takes a GPU's fused attention where torch, without a GPU, would fall back to the product of all pairs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, or the fused kernel for plain attention on a (fake) GPU."""
        settings = kwargs or {}
        is_plain = settings.get("attn_mask") is None and not settings.get("dropout_p") and not settings.get("is_causal")
        if (
            func is not F.scaled_dot_product_attention
            or len(args) != 3
            or not is_plain
            or args[0].device.type != "cuda"
        ):
            return func(*args, **settings)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else args[0].dtype
        query, key, value = (tensor.to(dtype) for tensor in args)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def _pretending(device: DeviceType) -> Generator[None]:
    """Let torch take a GPU's autocast for usable where there is no GPU: fake tensors need none."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if device == "cuda" and not torch.cuda.is_available():
            common = torch.cuda.amp.common
            stack.enter_context(mock.patch.object(common, "amp_definitely_not_available", return_value=False))
            stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
            stack.enter_context(_FusedAttention())
        yield
