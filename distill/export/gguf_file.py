"""Target `gguf`: encoder and InternVL projector in one mmproj file for llama.cpp, in float16 and in q8_0.

llama.cpp appends the class token behind the patches and reads its position from the last row, while every checkpoint
has it in the first; its own converter copies the rows as they are, and the features come out wrong without a word
(ggml-org/llama.cpp issue 25814). Here the row is moved, and libmtmd must reproduce the projected features before a
file is published: a release that reads the rows the other way is found out by the first export made with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import Bound, ConsumerFeatures, Reading, Variant
from distill.export.golden import Preprocessing
from distill.export.libmtmd import TESTED_VERSION, MtmdSession, llama_version
from distill.export.mmproj import (
    ACTIVATION_KEYS,
    PROJECTOR_WEIGHTS,
    QUANTUM,
    SCALE_FACTOR,
    llama_names,
    project,
    read_fields,
    read_projector,
    write_mmproj,
)
from distill.export.weights import check_position_grid, read_timm_weights, read_vit_shape, timm_skeleton

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "gguf"
VARIANTS = (
    Variant("f16", "mmproj-f16.gguf", Bound(cosine=0.9999)),
    Variant("q8_0", "mmproj-q8_0.gguf", Bound(cosine=0.9999)),
)
RMS_NORM_SHAPE = (3200, 45)
"""Width and depth for which llama.cpp takes an InternViT's norms for RMSNorm."""

GGUF_READING = Reading(
    cls_in_output=False,
    class_token="{count} token(s), which llama.cpp drops in front of the projector.",
    preprocessing="There is no config file: the GGUF keys hold size, mean and std, and llama.cpp itself cuts larger "
    "images into tiles of this size.",
    golden="the projected features",
)


@dataclass(frozen=True)
class GgufTarget:
    """The target; with a projector it can write, without one it can only read.

    Attributes:
        projector: safetensors file with `mlp1.{0,1,3}.{weight,bias}`.
    """

    projector: Path | None = None

    FORMAT: str = FORMAT
    REQUIRES: tuple[str, ...] = ("gguf", "llama_cpp")
    EXTRA: str = "gguf"
    INSTALL: str = "pip install 'encoder-distill[gguf]' && bash scripts/build_llama.sh"
    CONSUMER_FOLDER: str | None = "llama-cpp"
    LAYERS: tuple[int, ...] = (-1,)
    COMPANION: str = "projector"
    READING: Reading = GGUF_READING

    def with_companion(self, path: Path) -> GgufTarget:
        """Return the target that writes this projector beside the encoder."""
        return GgufTarget(path)

    def check(self, encoder: TimmLayoutEncoder) -> None:
        """Return when the encoder is of InternViT layout and fits the projector.

        Raises:
            ExportError: it does not, or there is no projector: llama.cpp loads no mmproj file without one.
        """
        _check_encoder(encoder)
        read_projector(self._projector(), encoder.embed_dim)

    def _projector(self) -> Path:
        if self.projector is None:
            raise ExportError(
                "llama.cpp loads an encoder only together with the projector into its language model. Give "
                f"--{self.COMPANION} FILE, a safetensors file with the weights {', '.join(PROJECTOR_WEIGHTS)}."
            )
        return self.projector

    def write(self, encoder: TimmLayoutEncoder, directory: Path) -> None:
        """Write both mmproj files.

        Raises:
            ExportError: the student or the projector does not fit, or a file cannot be written.
        """
        self.check(encoder)
        projector = read_projector(self._projector(), encoder.embed_dim)
        skeleton = timm_skeleton(encoder)
        weights = read_timm_weights(encoder, skeleton)
        check_position_grid(encoder, weights["pos_embed"])
        shape = read_vit_shape(skeleton)
        if shape.hidden_act not in ACTIVATION_KEYS:
            raise ExportError(f"llama.cpp's InternViT knows {', '.join(ACTIVATION_KEYS)}, not {shape.hidden_act}.")
        tensors = llama_names(weights, projector)
        for variant in VARIANTS:
            write_mmproj(directory / variant.file, encoder, shape, tensors, quantised=variant.name == "q8_0")

    def golden_features(self, encoder: TimmLayoutEncoder, directory: Path, pixel_values: Tensor) -> list[Layer]:
        """Return the projected features by torch, `[1, H/2, W/2, L]`, L being the language model's width."""
        projector = read_projector(self._projector(), encoder.embed_dim)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.image_mean, encoder.image_std))
        _, patches = encoder.forward_hidden_states(pixel_values * std + mean, 1)[-1]
        projected = project(patches, projector)
        return [(projected.new_zeros(1, 0, projected.shape[-1]), projected)]

    def variants(self, directory: Path) -> tuple[Variant, ...]:
        """Return the files that the directory holds."""
        return tuple(variant for variant in VARIANTS if (directory / variant.file).is_file())

    def consumer_features(
        self, directory: Path, variant: str, pixel_values: Tensor, num_layers: int
    ) -> ConsumerFeatures:
        """Return the projected features by libmtmd, which normalises the picture by the file's own mean and std.

        Raises:
            ExportError: libmtmd cannot load the file or encode the picture.
        """
        path = directory / next(item.file for item in VARIANTS if item.name == variant)
        fields = read_fields(path)
        picture = _as_picture(pixel_values, fields)
        session = MtmdSession(path, int(fields["clip.vision.projection_dim"]))
        side = int(fields["clip.vision.image_size"]) // int(fields["clip.vision.patch_size"]) // SCALE_FACTOR
        patches = torch.from_numpy(session.encode(picture)).unflatten(0, (1, side, side))
        layer = (patches.new_zeros(1, 0, patches.shape[-1]), patches)
        return ConsumerFeatures([layer], [], [], _consumer(), partial(session.encode, picture))

    def consumer_pixels(self, directory: Path, image: Image) -> Tensor:
        """Return the picture squashed to one tile by Pillow and normalised by the file's keys, `[1, 3, S, S]`.

        libmtmd does not hand out its pixels; that it normalises as the keys say shows in the features.
        """
        return _preprocessing(read_fields(directory / VARIANTS[0].file)).prepare(image)

    def loading_code(self) -> str:
        """Return the lines that load the export by llama-cpp-python, with a language model of the user's."""
        return """\
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

handler = MTMDChatHandler(clip_model_path=f"{directory}/mmproj-f16.gguf")
model = Llama(model_path="language-model.gguf", chat_handler=handler, n_ctx=4096)
image = {"type": "image_url", "image_url": {"url": "file:///path/to/photo.jpg"}}
question = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
print(model.create_chat_completion(messages=[question]))
"""


GGUF = GgufTarget()


def _check_encoder(encoder: TimmLayoutEncoder) -> None:
    if encoder.layout != "internvit":
        raise ExportError(
            f"A student of {encoder.layout!r} layout cannot be exported as {FORMAT}: llama.cpp computes InternViT "
            "rightly, but shifts CLIP's patches by one (its issue 25814) and knows no others. Use timm or onnx."
        )
    if (encoder.embed_dim, encoder.depth) == RMS_NORM_SHAPE:
        raise ExportError(
            f"llama.cpp takes every InternViT of width {RMS_NORM_SHAPE[0]} and depth {RMS_NORM_SHAPE[1]} for one with "
            "RMSNorm, and this one has LayerNorm. Leave out a block by --layers."
        )
    if (encoder.img_size // encoder.patch_size) % SCALE_FACTOR:
        raise ExportError(
            f"img_size {encoder.img_size} gives an odd grid of patches, which InternVL's projector cannot halve. "
            f"Give --img_size {encoder.img_size + encoder.patch_size}."
        )
    _check_quantum(encoder.embed_dim, "the width")
    _check_quantum(read_vit_shape(timm_skeleton(encoder)).mlp_dim, "the MLP's width")


def _check_quantum(width: int, name: str) -> None:
    if width % QUANTUM:
        raise ExportError(
            f"q8_0 packs {QUANTUM} weights of a row together, and {name} {width} is no multiple of it. Use onnx."
        )


def _consumer() -> str:
    version = llama_version()
    tested = "" if version == TESTED_VERSION else f", tested is {TESTED_VERSION}"
    return f"libmtmd of llama-cpp-python {version}{tested}"


def _preprocessing(fields: dict[str, Any]) -> Preprocessing:
    mean, std = (tuple(fields[f"clip.vision.{name}"]) for name in ("image_mean", "image_std"))
    return Preprocessing(int(fields["clip.vision.image_size"]), mean, std)


def _as_picture(pixel_values: Tensor, fields: dict[str, Any]) -> NDArray[np.uint8]:
    """Return the picture `[S, S, 3]` that normalisation by the file's mean and std made `pixel_values` of."""
    preprocessing = _preprocessing(fields)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.image_mean, preprocessing.image_std))
    levels = ((pixel_values[0] * std + mean) * 255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
