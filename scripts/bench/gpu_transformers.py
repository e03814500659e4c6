"""The same pair as transformers models in the loop that everybody writes, for scripts/bench/gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from gpu_cases import Sizes, build_task
from torch import nn


def transformers_pair(sizes: Sizes, device: torch.device) -> tuple[Any, Any, nn.Linear]:
    """Return teacher, student and head with random weights.

    Raises:
        ImportError: transformers is not installed, or too old for InternVL.
    """
    from transformers import InternVLVisionConfig, InternVLVisionModel

    shapes = build_task(sizes, torch.float32)
    theirs, ours = cast(Any, shapes.teachers["teacher"]), cast(Any, shapes.students["student0"])
    common: dict[str, Any] = {"image_size": sizes.img_size, "patch_size": 14}
    of_teacher = InternVLVisionConfig(
        hidden_size=theirs.embed_dim,
        num_hidden_layers=theirs.depth,
        num_attention_heads=theirs.config.num_heads,
        intermediate_size=theirs.config.mlp_dim,
        use_qk_norm=theirs.config.qk_norm,
        norm_type=theirs.config.norm_type,
        **common,
    )
    of_student = InternVLVisionConfig(
        hidden_size=ours.embed_dim,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.model.blocks[0].attn.num_heads,
        intermediate_size=4 * ours.embed_dim,
        attention_bias=True,
        **common,
    )
    with torch.device(device):
        teacher, student = InternVLVisionModel(of_teacher), InternVLVisionModel(of_student)
        head = nn.Linear(ours.embed_dim, theirs.embed_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return teacher.to(dtype).eval().requires_grad_(False), student, head


def transformers_step(sizes: Sizes, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one step of the last layer's negative cosine.

    Raises:
        ImportError: as `transformers_pair`.
    """
    teacher, student, head = transformers_pair(sizes, device)
    dtype = next(teacher.parameters()).dtype
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=1e-4)
    images = torch.rand(batch, 3, sizes.img_size, sizes.img_size, device=device)

    def step() -> None:
        with torch.no_grad():
            target = teacher(images.to(dtype), output_hidden_states=True).hidden_states[-1][:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            own = head(student(images, output_hidden_states=True).hidden_states[-1][:, 1:])
            loss = -torch.cosine_similarity(own.float(), target.float(), dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
