"""Target `open_clip`: a directory for open_clip's `local-dir:` schema, with an original text tower beside the student.

open_clip has no vision tower without a text tower. So one is taken, bit for bit, from a local open_clip directory
(`--text_tower`), with its projection of the class token: whatever used that model's text features goes on as before.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import FLOAT32_BOUND, ConsumerFeatures, ExportTarget, Reading, Variant
from distill.export.files import cannot_write, write_json, write_safetensors
from distill.export.weights import (
    check_position_grid,
    read_timm_weights,
    read_vit_shape,
    refuse_leftovers,
    rename_block_weights,
    timm_skeleton,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "open_clip"
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
OTHER_WEIGHTS = ("open_clip_pytorch_model.bin", "*.safetensors", "*.bin", "*.pt", "*.msgpack", "*.h5", "*.onnx")

_EMBEDDINGS = {
    "patch_embed.proj.weight": "conv1.weight",
    "norm_pre.weight": "ln_pre.weight",
    "norm_pre.bias": "ln_pre.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
}
_BLOCKS = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# Anything but their defaults makes open_clip's tower another function than CLIP's.
_PLAIN_TOWER: dict[str, Any] = {
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "block_type": None,
    "ls_init_value": None,
    "timm_model_name": None,
    "norm_kwargs": None,
    "act_kwargs": None,
}


@dataclass(frozen=True)
class OpenCLIPTarget:
    """The target; see `ExportTarget`.

    Attributes:
        text_tower: a local open_clip directory; None can only verify.
    """

    text_tower: Path | None = None

    FORMAT = FORMAT
    REQUIRES = ("open_clip",)
    EXTRA = "export"
    CONSUMER_FOLDER: str | None = None
    LAYERS = (-2, -1)
    COMPANION = "text_tower"
    READING = Reading(
        cls_in_output=False,
        class_token="{count} token(s), not in `features`: the lines above give the patches alone.",
    )

    def with_companion(self, path: Path) -> ExportTarget:
        """Return the target that takes the text tower of this directory."""
        return OpenCLIPTarget(path)

    def check(self, encoder: TimmLayoutEncoder) -> None:
        """Return when the encoder is of CLIP layout and the text tower's model has a tower of its width.

        Raises:
            ExportError: it is not, or no text tower is given.
        """
        if encoder.layout != "clip":
            raise ExportError(
                f"A student of {encoder.layout!r} layout cannot be exported as {FORMAT}: open_clip's vision tower "
                "normalises tokens before the first block, has no LayerScale and no patch bias. Use timm, or train a "
                "CLIP-layout student."
            )
        _fit(encoder, _read_config(self._directory()), self._directory())

    def _directory(self) -> Path:
        if self.text_tower is None:
            raise ExportError(
                f"{FORMAT} needs a text tower beside the student: give --text_tower DIR, a local open_clip directory "
                f"with {CONFIG} and {WEIGHTS}."
            )
        return self.text_tower

    def write(self, encoder: TimmLayoutEncoder, directory: Path) -> None:
        """Write open_clip's config and weights, and copy the text tower's tokenizer files.

        Raises:
            ExportError: a weight has no place, or the text tower's directory is damaged.
        """
        self.check(encoder)
        source = self._directory()
        config, originals = _read_config(source), _read_originals(source)
        skeleton = timm_skeleton(encoder)
        weights = read_timm_weights(encoder, skeleton)
        check_position_grid(encoder, weights["pos_embed"])
        tower = _rename(weights, encoder.embed_dim)
        kept = {key: value for key, value in originals.items() if not key.startswith("visual.")}
        tower["visual.proj"] = _projection(originals, encoder, config, source)
        for name in ("weight", "bias"):
            # A student without the last norm keeps the original model's: only the pooled output reads it.
            tower.setdefault(f"visual.ln_post.{name}", originals[f"visual.ln_post.{name}"])
        shape = read_vit_shape(skeleton)
        write_json(directory / CONFIG, _config(config, encoder, shape.num_heads, shape.mlp_dim))
        write_safetensors(directory / WEIGHTS, {**kept, **tower})
        _copy_tokenizer(source, directory)

    def variants(self, directory: Path) -> tuple[Variant, ...]:
        """Return the one file, float32."""
        return (Variant("float32", WEIGHTS, FLOAT32_BOUND),) if (directory / WEIGHTS).is_file() else ()

    def consumer_features(
        self, directory: Path, variant: str, pixel_values: Tensor, num_layers: int
    ) -> ConsumerFeatures:
        """Return the last hidden states by open_clip's own vision tower, `visual.forward_intermediates`."""
        import open_clip

        model, _ = cast(Any, open_clip).create_model_from_pretrained(f"local-dir:{directory}")
        stored, wanted = set(load_file(directory / WEIGHTS)), set(model.state_dict())
        forward = partial(_layers, model.eval(), pixel_values, num_layers)
        name = f"{type(model).__name__} of open_clip {open_clip.__version__}"
        return ConsumerFeatures(forward(), sorted(wanted - stored), sorted(stored - wanted), name, forward)

    def consumer_pixels(self, directory: Path, image: Image) -> Tensor:
        """Return the image as open_clip's own transform prepares it, `[1, 3, H, W]`."""
        import open_clip

        _, preprocess = cast(Any, open_clip).create_model_from_pretrained(f"local-dir:{directory}")
        return preprocess(image).unsqueeze(0)

    def loading_code(self) -> str:
        """Return the lines that load the export by open_clip alone."""
        return """\
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
pixel_values = preprocess(Image.open("photo.jpg")).unsqueeze(0)
with torch.inference_mode():
    output = model.eval().visual.forward_intermediates(pixel_values, indices=1, output_fmt="NLC")
features = output["image_intermediates"][-1]  # [B, N, D]
"""


def _layers(model: Any, pixel_values: Tensor, num_layers: int) -> list[Layer]:
    with torch.inference_mode():
        output = model.visual.forward_intermediates(
            pixel_values, indices=num_layers, output_extra_tokens=True, intermediates_only=True
        )
    pairs = zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
    return [(prefix, patches.permute(0, 2, 3, 1)) for prefix, patches in pairs]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if {"vision_cfg", "text_cfg", "embed_dim"} - set(config["model_cfg"]):
            raise KeyError("vision_cfg, text_cfg or embed_dim")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"--text_tower {directory} is no open_clip directory: {path.name} is missing or incomplete ({error})."
        ) from error
    return cast(dict[str, Any], config)


def _read_originals(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"--text_tower: {directory / WEIGHTS} is missing or damaged: {error}.") from error


def _fit(encoder: TimmLayoutEncoder, config: dict[str, Any], directory: Path) -> None:
    model, vision = config["model_cfg"], config["model_cfg"]["vision_cfg"]
    act = read_vit_shape(timm_skeleton(encoder)).hidden_act
    needed = {"quick_gelu": True, "gelu": False}.get(act)
    has = bool(model.get("quick_gelu", False))
    unlike = [key for key, plain in _PLAIN_TOWER.items() if vision.get(key, plain) not in (plain, {}, None)]
    if vision.get("width", 768) != encoder.embed_dim:
        reason = f"its vision tower has width {vision.get('width', 768)}, the student {encoder.embed_dim}"
    elif unlike:
        reason = f"its vision_cfg sets {', '.join(unlike)}, so its projection was trained on another pooling"
    elif needed is None or needed != has:
        reason = f"its quick_gelu is {has} and holds for both towers; the student's activation is {act}"
    else:
        return
    raise ExportError(
        f"The text tower of {directory} does not fit this student: {reason}. Give the --text_tower of the CLIP "
        "that the student was initialised from."
    )


def _projection(
    originals: dict[str, Tensor], encoder: TimmLayoutEncoder, config: dict[str, Any], directory: Path
) -> Tensor:
    projection, expected = originals.get("visual.proj"), (encoder.embed_dim, int(config["model_cfg"]["embed_dim"]))
    if projection is None or tuple(projection.shape) != expected:
        found = "no visual.proj" if projection is None else f"a visual.proj of shape {tuple(projection.shape)}"
        raise ExportError(f"--text_tower {directory / WEIGHTS} has {found}; {expected} fits the student.")
    return projection


def _rename(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    renamed = {
        "class_embedding": weights.pop("cls_token").reshape(width),
        "positional_embedding": weights.pop("pos_embed")[0].contiguous(),
    }
    renamed |= {name: weights.pop(key) for key, name in _EMBEDDINGS.items() if key in weights}
    # torch's MultiheadAttention keeps the three projections in one, under names with an underscore.
    for key in [key for key in weights if ".attn.qkv." in key]:
        block, kind = key.split(".")[1], key.rpartition(".")[2]
        renamed[f"transformer.resblocks.{block}.attn.in_proj_{kind}"] = weights.pop(key)
    renamed |= rename_block_weights(weights, _BLOCKS, "transformer.resblocks.{}", ("q", "k", "v"))
    for key in ("head.weight", "head.bias"):
        weights.pop(key, None)
    refuse_leftovers(weights, "open_clip's VisionTransformer")
    return {f"visual.{key}": value for key, value in renamed.items()}


def _config(original: dict[str, Any], encoder: TimmLayoutEncoder, num_heads: int, mlp_dim: int) -> dict[str, Any]:
    vision = {
        **original["model_cfg"]["vision_cfg"],
        "layers": encoder.depth,
        "width": encoder.embed_dim,
        "head_width": encoder.embed_dim // num_heads,
        "mlp_ratio": mlp_dim / encoder.embed_dim,
        "patch_size": encoder.patch_size,
        "image_size": encoder.img_size,
    }
    preprocess = {
        "size": [encoder.img_size, encoder.img_size],
        "mode": "RGB",
        "mean": list(encoder.image_mean),
        "std": list(encoder.image_std),
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    }
    return {"model_cfg": {**original["model_cfg"], "vision_cfg": vision}, "preprocess_cfg": preprocess}


def _copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy what lies beside the text tower's weights: its tokenizer, where open_clip's own is not used."""
    for path in sorted(source.iterdir()):
        is_weights = any(path.match(pattern) for pattern in OTHER_WEIGHTS)
        if path.is_file() and not is_weights and path.name not in (CONFIG, "README.md", "manifest.json"):
            try:
                shutil.copyfile(path, directory / path.name)
            except OSError as error:
                raise cannot_write(directory / path.name, error) from error


TARGET: ExportTarget = OpenCLIPTarget()
