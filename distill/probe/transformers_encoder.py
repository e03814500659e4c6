"""A transformers vision model, read from a local directory, as an `Encoder`: exports are judged as a VLM loads them.

No remote code is run and nothing is downloaded. transformers itself returns a randomly initialised model when the
keys of a file do not fit (with a warning); here that is an error.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import Layer

PREFIX_TOKENS: dict[str, Callable[[dict[str, Any]], int]] = {
    "clip": lambda config: 1,
    "clip_vision_model": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + int(config.get("num_register_tokens", 4)),
    "ijepa": lambda config: 0,
    "internvl_vision": lambda config: 1,
    "siglip": lambda config: 0,
    "siglip_vision_model": lambda config: 0,
    "vit": lambda config: 1,
}
"""The model types that can be read, with the number of prefix tokens of each: transformers does not tell it."""

_VISION_CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}  # directories of a two-tower model
_UNUSED = ("pooler", "layernorm", "post_layernorm", "head", "position_ids", "mask_token")


class TransformersEncoder(nn.Module):
    """The vision model in a transformers directory; hidden states are its blocks' outputs, before any final norm.

    Args:
        weights: directory with config.json, safetensors and preprocessor_config.json.

    Raises:
        FileNotFoundError: config.json or preprocessor_config.json is missing.
        ValueError: the model type is not one of `PREFIX_TOKENS`, or the mean and std are missing.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self._directory = Path(weights)
        raw = _read_json(self._directory / "config.json")
        self._model_type = str(raw.get("model_type"))
        if self._model_type not in PREFIX_TOKENS:
            raise ValueError(
                f"{self._directory / 'config.json'}: model_type {self._model_type!r} is not one of "
                f"{', '.join(sorted(PREFIX_TOKENS))}. Give a directory of one of these, or a YAML file that names a "
                "class_path of your own."
            )
        transformers = cast(Any, import_module("transformers"))
        config = transformers.AutoConfig.from_pretrained(self._directory, local_files_only=True)
        self._config = getattr(config, "vision_config", config)
        self._mean, self._std = _mean_and_std(self._directory / "preprocessor_config.json")
        self._prefix_tokens = PREFIX_TOKENS[self._model_type](self._config.to_dict())
        self._patch = _first(self._config.patch_size)
        self.model: nn.Module | None = None

    @property
    def embed_dim(self) -> int:
        """Width of the last hidden state."""
        return int(self._config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self._config.num_hidden_layers)

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Width of each block's output."""
        return (self.embed_dim,) * self.depth

    @property
    def patch_size(self) -> int:
        """Pixels a side of one patch."""
        return self._patch

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers."""
        return self._prefix_tokens

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Channel means of preprocessor_config.json."""
        return self._mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Channel standard deviations of preprocessor_config.json."""
        return self._std

    def load_weights(self) -> None:
        """Read the directory's weights, strictly but for parts that no hidden state depends on.

        Raises:
            FileNotFoundError: the weight file is missing.
            ValueError: a tensor is missing, of another shape, or cannot be read.
        """
        if self.model is not None:
            return
        transformers = cast(Any, import_module("transformers"))
        model_class = getattr(transformers, _VISION_CLASSES.get(self._model_type, "AutoModel"))
        try:
            loaded, info = model_class.from_pretrained(
                self._directory,
                config=self._config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except OSError as error:
            raise FileNotFoundError(f"{self._directory} has no readable safetensors weights: {error}") from error
        except Exception as error:  # safetensors and transformers raise kinds of their own for damaged or unfit files
            raise ValueError(f"{self._directory} cannot be loaded by {model_class.__name__}: {error}") from error
        missing = sorted(key for key in info["missing_keys"] if not _is_unused(key))
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"{self._directory} does not hold a whole {type(loaded).__name__}: {len(missing)} tensors missing "
                f"(first: {missing[:1]}), of another shape: {list(info['mismatched_keys'])[:1]}. transformers would "
                "fill them at random. Export again, or check config.json's architectures."
            )
        self.model = loaded.eval()

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        """Return the outputs of the last `num_layers` blocks, as `distill.encoder.Encoder` says.

        Raises:
            RuntimeError: the weights are not loaded.
            ValueError: the image size is no multiple of the patch size, or `num_layers` is out of range.
        """
        if self.model is None:
            raise RuntimeError("TransformersEncoder has no weights yet; call load_weights() first.")
        if not 1 <= num_layers <= self.depth:
            raise ValueError(f"num_layers {num_layers} must be from 1 to the depth, {self.depth}.")
        height, width = images.shape[-2:]
        if height % self._patch or width % self._patch:
            raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {self._patch}.")
        grid = (height // self._patch, width // self._patch)
        return [self._split(state, grid) for state in self._block_outputs(self._normalise(images), num_layers)]

    def _normalise(self, images: Tensor) -> Tensor:
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (self._mean, self._std))
        return (scaled - mean) / std

    def _block_outputs(self, pixels: Tensor, num_layers: int) -> list[Tensor]:
        # Hooks, not output_hidden_states: transformers 4.57 refuses that argument for InternVLVisionModel.
        model = cast(nn.Module, self.model)
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in _blocks(model, self.depth)[-num_layers:]]
        native = _first(self._config.image_size)
        # CLIP and ViT refuse other sizes unless told to resize their positions; InternVL and DINOv2 always do.
        resizes = tuple(pixels.shape[-2:]) != (native, native) and _takes_interpolation(model)
        try:
            model(pixel_values=pixels, **({"interpolate_pos_encoding": True} if resizes else {}))
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _split(self, state: Tensor, grid: tuple[int, int]) -> Layer:
        prefix = state[:, : self._prefix_tokens]
        return prefix, state[:, self._prefix_tokens :].unflatten(1, grid)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a transformers directory has it. Export again or copy it there.")
    loaded: object = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return cast(dict[str, Any], loaded)


def _mean_and_std(file: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    raw = _read_json(file)
    values: list[tuple[float, float, float]] = []
    for key in ("image_mean", "image_std"):
        numbers = raw.get(key)
        if not isinstance(numbers, list) or len(cast(list[Any], numbers)) != 3:
            raise ValueError(f"{file}: {key} {numbers!r} must be three numbers; features depend on them.")
        red, green, blue = cast(list[float], numbers)
        values.append((float(red), float(green), float(blue)))
    return values[0], values[1]


def _first(size: Any) -> int:
    """Size in pixels of a square given as one number or as (height, width)."""
    return int(size[0] if isinstance(size, list | tuple) else size)


def _is_unused(key: str) -> bool:
    """Whether a tensor comes after, or beside, every block: a final norm, a pooler, a head."""
    parts = key.split(".")
    return not {"layer", "layers"} & set(parts) and any(part in _UNUSED for part in parts)


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {depth} blocks to read hidden states from.")


def _takes_interpolation(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
