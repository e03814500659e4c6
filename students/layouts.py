"""The names under which CLIP and InternViT weights are published, and the way to timm's names.

A layout is a table from timm's name to the published name or names. Conversion is strict: every tensor of the
vision tower must be there, none may be left over, and each must have the shape the student needs. Which layout a
file has is read from its keys.

Sources: open_clip `open_clip/transformer.py` (also the key names of OpenAI's own archives); transformers
`models/clip/modeling_clip.py` and `models/internvl/modeling_internvl.py`; InternVL
`internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py`; timm `models/vision_transformer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["clip", "internvit"]
Names = dict[str, tuple[str, ...]]
"""timm's name -> published names, concatenated along the first axis when there are several."""


def _pairs(table: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Return the table for `.weight` and `.bias` of every row."""
    names: Names = {}
    for target, source in table.items():
        for part in ("weight", "bias"):
            sources = (source,) if isinstance(source, str) else source
            names[f"{target}.{part}"] = tuple(f"{name}.{part}" for name in sources)
    return names


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a vision tower.

    Attributes:
        title: how a message names it.
        kind: which network it describes.
        signature: a key, without prefix, that only this layout has.
        stem: names outside the blocks.
        block: names inside a block, relative to it.
        block_prefix: what stands in front of a block's number.
        prefixes: what may stand in front of every name of the vision tower; names without it belong to other towers.
        unused: vision names that the hidden states do not depend on; they may be present and are left out.
    """

    title: str
    kind: Kind
    signature: str
    stem: Names
    block: Names
    block_prefix: str
    prefixes: tuple[str, ...]
    unused: frozenset[str] = frozenset()

    def names(self, depth: int) -> Names:
        """Return the whole table for `depth` blocks."""
        table = dict(self.stem)
        for i in range(depth):
            for target, sources in self.block.items():
                table[f"blocks.{i}.{target}"] = tuple(f"{self.block_prefix}{i}.{name}" for name in sources)
        return table


_CLIP_SAME = {"patch_embed.proj.weight", "cls_token", "pos_embed"}
_TIMM_BLOCK = _pairs({k: k for k in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")})
_TIMM_LAYER_SCALE: Names = {"ls1.gamma": ("ls1.gamma",), "ls2.gamma": ("ls2.gamma",)}

LAYOUTS = (
    Layout(
        title="open_clip or OpenAI CLIP",
        kind="clip",
        signature="ln_pre.weight",
        stem={
            "cls_token": ("class_embedding",),
            "pos_embed": ("positional_embedding",),
            "patch_embed.proj.weight": ("conv1.weight",),
            **_pairs({"norm_pre": "ln_pre", "norm": "ln_post"}),
        },
        block={
            "attn.qkv.weight": ("attn.in_proj_weight",),
            "attn.qkv.bias": ("attn.in_proj_bias",),
            **_pairs({"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj"}),
            **_pairs({"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}),
        },
        block_prefix="transformer.resblocks.",
        prefixes=("visual.", ""),
        unused=frozenset({"proj"}),
    ),
    Layout(
        title="transformers CLIPModel or CLIPVisionModel",
        kind="clip",
        signature="pre_layrnorm.weight",
        stem={
            "cls_token": ("embeddings.class_embedding",),
            "pos_embed": ("embeddings.position_embedding.weight",),
            "patch_embed.proj.weight": ("embeddings.patch_embedding.weight",),
            **_pairs({"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}),
        },
        block=_pairs(
            {
                "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.proj": "self_attn.out_proj",
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
        ),
        block_prefix="encoder.layers.",
        prefixes=("vision_model.", ""),
        unused=frozenset({"embeddings.position_ids"}),
    ),
    Layout(
        title="timm CLIP",
        kind="clip",
        signature="norm_pre.weight",
        stem={**{name: (name,) for name in sorted(_CLIP_SAME)}, **_pairs({"norm_pre": "norm_pre", "norm": "norm"})},
        block=_TIMM_BLOCK,
        block_prefix="blocks.",
        prefixes=("model.", ""),
        unused=frozenset({"head.weight", "head.bias"}),
    ),
    Layout(
        title="InternViT release",
        kind="internvit",
        signature="encoder.layers.0.ls1",
        stem={
            "cls_token": ("embeddings.class_embedding",),
            "pos_embed": ("embeddings.position_embedding",),
            **_pairs({"patch_embed.proj": "embeddings.patch_embedding"}),
        },
        block={**_TIMM_BLOCK, "ls1.gamma": ("ls1",), "ls2.gamma": ("ls2",)},
        block_prefix="encoder.layers.",
        prefixes=("vision_model.", ""),
    ),
    Layout(
        title="transformers InternVLVisionModel",
        kind="internvit",
        signature="encoder.layer.0.lambda_1",
        stem={
            "cls_token": ("embeddings.cls_token",),
            "pos_embed": ("embeddings.position_embeddings",),
            **_pairs({"patch_embed.proj": "embeddings.patch_embeddings.projection"}),
        },
        block={
            "ls1.gamma": ("lambda_1",),
            "ls2.gamma": ("lambda_2",),
            **_pairs(
                {
                    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                    "attn.proj": "attention.projection_layer",
                    "norm1": "layernorm_before",
                    "norm2": "layernorm_after",
                    "mlp.fc1": "mlp.fc1",
                    "mlp.fc2": "mlp.fc2",
                }
            ),
        },
        block_prefix="encoder.layer.",
        prefixes=("model.vision_tower.", "vision_tower.", ""),
    ),
    Layout(
        title="timm InternViT",
        kind="internvit",
        signature="blocks.0.ls1.gamma",
        stem={
            "cls_token": ("cls_token",),
            "pos_embed": ("pos_embed",),
            **_pairs({"patch_embed.proj": "patch_embed.proj"}),
        },
        block={**_TIMM_BLOCK, **_TIMM_LAYER_SCALE},
        block_prefix="blocks.",
        prefixes=("model.", ""),
    ),
)


def find_layout(state: Mapping[str, Tensor], path: str) -> tuple[Layout, str]:
    """Return the layout of a state dict and the prefix its vision tower has.

    Args:
        state: tensors as stored.
        path: where they come from, for the message.

    Raises:
        ValueError: the keys are of no known layout.
    """
    for layout in LAYOUTS:
        for prefix in layout.prefixes:
            if prefix + layout.signature in state:
                return layout, prefix
    known = "; ".join(f"{layout.title} (key {layout.prefixes[0]}{layout.signature})" for layout in LAYOUTS)
    raise ValueError(
        f"The weights {path} have no known layout; their keys begin {', '.join(sorted(state)[:3])}. Known: {known}. "
        "Name a CLIP or InternViT vision checkpoint, or the word `random`."
    )


def convert_to_timm(
    state: Mapping[str, Tensor], layout: Layout, prefix: str, shapes: Mapping[str, torch.Size], path: str
) -> dict[str, Tensor]:
    """Return the vision tower of `state` under timm's names, float32, checked tensor by tensor.

    Args:
        state: tensors as stored; those of other towers are ignored.
        layout: what `find_layout` said.
        prefix: what `find_layout` said.
        shapes: shape of each tensor of the student's network under timm's names. The number of rows of `pos_embed`
            may differ: it is resized later.
        path: where the tensors come from, for messages.

    Returns:
        Contiguous tensors of their own memory, with exactly the keys of `shapes`.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in shapes) if m), default=-1)
    names = {target: tuple(prefix + s for s in sources) for target, sources in layout.names(depth).items()}
    _check_keys(state, layout, prefix, names, depth, path)
    converted: dict[str, Tensor] = {}
    for target, sources in names.items():
        needed = shapes[target]
        stored = [state[source] for source in sources]
        tensor = torch.cat([part.float() for part in stored])
        # Published class tokens and positions lack the leading axes of timm's.
        tensor = tensor.reshape((1,) * (len(needed) - tensor.ndim) + tuple(tensor.shape))
        is_resizable = target == "pos_embed" and tensor.ndim == len(needed)
        if tensor.shape != (torch.Size((1, tensor.shape[1], needed[2])) if is_resizable else needed):
            raise ValueError(
                f"The weights {path} do not fit the student: {' + '.join(sources)} has shape "
                f"{' + '.join(str(list(part.shape)) for part in stored)}; the student needs {list(needed)} for "
                f"{target}. Set embed_dim, patch_size and mlp_ratio to those of the file, or name another file."
            )
        converted[target] = tensor.contiguous()
    grid_size(converted["pos_embed"], path)
    return converted


def _check_keys(state: Mapping[str, Tensor], layout: Layout, prefix: str, names: Names, depth: int, path: str) -> None:
    expected = {source for sources in names.values() for source in sources}
    unused = {prefix + name for name in layout.unused}
    present = {key for key in state if key.startswith(prefix)}
    missing, unknown = sorted(expected - present), sorted(present - expected - unused)
    if not missing and not unknown:
        return
    block = re.compile(re.escape(prefix + layout.block_prefix) + r"(\d+)\.")
    stored_depth = 1 + max((int(m[1]) for m in map(block.match, present) if m), default=-1)
    if stored_depth != depth:
        raise ValueError(
            f"The weights {path} ({layout.title}) have {stored_depth} blocks; the student's depth is {depth}. "
            f"Set depth to {stored_depth}, or name another file."
        )
    detail = "; ".join(
        f"{len(keys)} {what} (first: {keys[0]})" for what, keys in (("missing", missing), ("unknown", unknown)) if keys
    )
    raise ValueError(
        f"The weights {path} ({layout.title}) do not hold this vision tower: tensors {detail}. Every tensor must be "
        "there and none left over: name a plain ViT without q/k norm, RMSNorm or registers."
    )


def grid_size(pos_embed: Tensor, path: str, num_prefix: int = 1) -> int:
    """Return the side of the square grid that `pos_embed` `[1, num_prefix + g * g, C]` is for.

    Raises:
        ValueError: its rows, less those of prefix tokens, are no square number.
    """
    patches = pos_embed.shape[1] - num_prefix
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise ValueError(
            f"The position embedding of {path} has {pos_embed.shape[1]} rows; it must have {num_prefix} for class "
            "token and registers, and those of a square grid. Name the weights of a ViT trained on square images."
        )
    return side
