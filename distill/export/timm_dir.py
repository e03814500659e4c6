"""Target `timm`: a directory for `timm.create_model("local-dir:DIR", pretrained=True)`.

transformers' `AutoModel` and `AutoImageProcessor` read the same directory through their timm wrapper.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import CONFIG_FILE, WEIGHTS_FILE, ConsumerFeatures, Reading, Variant, single_variant
from distill.export.files import write_json, write_safetensors
from distill.export.weights import read_timm_weights, strides_of, timm_skeleton

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "timm"
REQUIRES = ("timm",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-2, -1)
READING = Reading(
    cls_in_output=False,
    class_token="{count} token(s), not in `features`: the lines above give the patches alone. transformers' "
    "`AutoModel` has them in front of the patches.",
)


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when `timm.create_model` can rebuild the encoder; every layout is then welcome.

    Raises:
        ExportError: timm does not know the architecture, or has no argument for the student's strides.
    """
    import timm

    if not timm.is_model(encoder.timm_architecture):
        raise ExportError(
            f"timm {timm.__version__} has no model {encoder.timm_architecture!r}, so no {FORMAT} export can be "
            "loaded. Give the student a timm architecture, or another timm release."
        )
    strides = strides_of(encoder)
    if strides:
        raise ExportError(
            f"The student sets the strides {strides} on timm's {encoder.timm_architecture!r}, and `timm.create_model` "
            f"has no argument for that: a {FORMAT} export would compute other features. Export it as onnx, pt2 or "
            "executorch, which hold the whole graph."
        )


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write config.json and model.safetensors for timm.

    Raises:
        ExportError: the weights are not those of the architecture, or a file cannot be written.
    """
    check(encoder)
    skeleton = timm_skeleton(encoder)
    weights = read_timm_weights(encoder, skeleton)
    write_json(directory / CONFIG_FILE, _config(encoder, skeleton))
    write_safetensors(directory / WEIGHTS_FILE, weights)


def _config(encoder: TimmLayoutEncoder, skeleton: nn.Module) -> dict[str, Any]:
    model = cast(Any, skeleton)
    own = cast(dict[str, Any], model.pretrained_cfg)
    num_classes = int(model.num_classes)
    return {
        "architecture": encoder.timm_architecture.partition(".")[0],
        "num_classes": num_classes,
        "num_features": int(model.num_features),
        "global_pool": str(getattr(model, "global_pool", "") or ""),
        # num_classes stands above: transformers' wrapper passes its own and refuses a second.
        "model_args": {key: value for key, value in encoder.timm_model_args.items() if key != "num_classes"},
        "pretrained_cfg": {
            "tag": "distilled",
            "custom_load": False,
            "input_size": [3, encoder.img_size, encoder.img_size],
            "fixed_input_size": bool(own.get("fixed_input_size", False)),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(encoder.image_mean),
            "std": list(encoder.image_std),
            "num_classes": num_classes,
            "pool_size": own.get("pool_size"),
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return single_variant(directory)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last hidden states by `timm.create_model` and `forward_intermediates`."""
    import timm
    from safetensors import safe_open

    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        stored = set(file.keys())
    wanted = set(model.state_dict())
    consumer = f"{type(model).__name__} of timm {timm.__version__}"
    forward = partial(_layers, model, pixel_values, num_layers)
    return ConsumerFeatures(forward(), sorted(wanted - stored), sorted(stored - wanted), consumer, forward)


def _layers(model: Any, pixel_values: Tensor, num_layers: int) -> list[Layer]:
    options: dict[str, Any] = {"indices": num_layers, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    has_prefix = bool(getattr(model, "num_prefix_tokens", 0))
    if has_prefix:
        options["return_prefix_tokens"] = True
    with torch.inference_mode():
        outputs = model.forward_intermediates(pixel_values, **options)
    layers: list[Layer] = []
    for output in outputs:
        patches, prefix = output if has_prefix else (output, None)
        patches = patches.permute(0, 2, 3, 1)
        layers.append((patches.new_zeros(len(patches), 0, patches.shape[-1]) if prefix is None else prefix, patches))
    return layers


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as `timm.data.create_transform` prepares it, `[1, 3, H, W]`."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    with torch.device("meta"):
        model = timm.create_model(f"local-dir:{directory}")
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    return transform(image).unsqueeze(0)


def loading_code() -> str:
    """Return six lines that load the export by timm alone."""
    return """\
import timm
import torch
from PIL import Image

model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixel_values = transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    layers = model.forward_intermediates(pixel_values, indices=1, norm=False, intermediates_only=True)
features = layers[-1].flatten(2).transpose(1, 2)  # [B, N, D]
"""
