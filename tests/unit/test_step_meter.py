"""The FLOPs of a real step, on real tensors, agree with torch's counter and with arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import students
import teachers
from distill.alignment import AlignmentConfig
from distill.planner.simulate import step_cost
from distill.planner.speed import fill_randomly
from distill.step_meter import HEADS, FlopMeter, StepParts
from distill.task import DistillationTask

SIDE_PX = 64
TOLERANCE = 0.01


def small_internvit() -> teachers.InternViT:
    config = teachers.InternViTConfig(embed_dim=48, depth=2, num_heads=3, mlp_dim=96, patch_size=16, img_size=SIDE_PX)
    return teachers.InternViT("random", config, dtype="float32", attention="explicit")


TEACHERS = {
    "internvit": small_internvit,
    "timm_vit": lambda: teachers.TimmTeacher("test_vit", weights="random", img_size=SIDE_PX),
    "timm_convnext": lambda: teachers.TimmTeacher("test_convnext", weights="random"),
    "timm_efficientnet": lambda: teachers.TimmTeacher("test_efficientnet", weights="random"),
}
SMALL = {"img_size": SIDE_PX, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
STUDENTS = {
    "internvit": lambda: students.InternViT("random", **SMALL, attention="explicit"),
    "internvit_checkpointed": lambda: students.InternViT(
        "random", **SMALL, attention="explicit", grad_checkpointing=True
    ),
    "timm_vit": lambda: students.TimmStudent("test_vit", "random", img_size=SIDE_PX, attention="explicit"),
    "timm_efficientnet": lambda: students.TimmStudent("test_efficientnet", "random", img_size=SIDE_PX),
}
PAIRS = [
    ("internvit", "internvit"),
    ("timm_vit", "internvit_checkpointed"),
    ("timm_convnext", "timm_vit"),
    ("timm_efficientnet", "timm_efficientnet"),
]


def build(teacher: str, student: str) -> DistillationTask:
    config = AlignmentConfig("s", "t", num_layers=2)
    return DistillationTask({"t": TEACHERS[teacher]()}, {"s": STUDENTS[student]()}, [config])


def real_batch(size: int) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (size, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    return {"images": images, "row": torch.arange(size)}


@pytest.fixture
def explicit_attention() -> Iterator[None]:
    """Have timm multiply attention out: torch's counter has no formula for the fused kernel of a CPU."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


@pytest.mark.usefixtures("explicit_attention")
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_planned_flops_are_what_torch_counts_in_a_real_step(teacher: str, student: str) -> None:
    task = build(teacher, student)
    planned = step_cost(task, 2, img_size_px=SIDE_PX, device="cpu", precision="32-true").flops.total()
    fill_randomly(task, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        task._step(real_batch(2))["loss/total"].backward()
    assert planned == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)


@pytest.mark.parametrize("chunk_tokens", [0, 4096])
def test_the_meter_gives_each_part_and_direction_its_own(chunk_tokens: int) -> None:
    task = build("internvit", "internvit_checkpointed")
    for alignment in task.alignments:
        alignment.config.chunk_tokens = chunk_tokens
    flops = step_cost(task, 2, img_size_px=SIDE_PX, device="cpu", precision="32-true").flops
    if chunk_tokens:  # the gradients of a projection are computed while it is there, in the forward pass
        flops[HEADS, "backward"] = flops[HEADS, "forward"] * 2 // 3
        flops[HEADS, "forward"] //= 3
    assert set(flops) == {
        ("teacher t", "forward"),
        ("student s", "forward"),
        ("student s", "recompute"),
        ("student s", "backward"),
        (HEADS, "forward"),
        (HEADS, "backward"),
    }
    assert flops[HEADS, "backward"] == pytest.approx(2 * flops[HEADS, "forward"], rel=TOLERANCE)
    assert flops["student s", "recompute"] < flops["student s", "forward"]


def test_fused_attention_on_a_cpu_counts_as_two_products_forward_and_five_backward() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    one_product = 2 * 2 * 6 * 6 * 8
    parts = StepParts()
    with FlopMeter(parts) as meter:
        out = F.scaled_dot_product_attention(query, key, value)
        parts.begin_backward()
        out.sum().backward()
    assert meter.flops["targets", "forward"] == 2 * one_product
    assert meter.flops[HEADS, "backward"] == 5 * one_product


def test_recomputed_work_is_not_useful_work() -> None:
    # torch stops running a forward again where nothing more is needed: before the last layer's product.
    layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    parts = StepParts()
    with FlopMeter(parts) as meter:
        loss = torch.utils.checkpoint.checkpoint(layer, torch.ones(4, 8), use_reentrant=False).sum()
        parts.begin_backward()
        loss.backward()
    assert meter.flops[HEADS, "recompute"] == 2 * 4 * 8 * 8
    assert meter.useful == meter.flops.total() - 2 * 4 * 8 * 8


def test_an_encoder_is_left_as_it_was() -> None:
    task = build("internvit", "internvit")
    before = dict(vars(task.students["s"]))
    with StepParts().watching({"t": task.teachers["t"]}, dict(task.students.items())):
        assert "forward_hidden_states" in vars(task.students["s"])
    assert vars(task.students["s"]) == before
