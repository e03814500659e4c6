"""A timm model as an encoder whose last hidden states can be read; the base of every student.

Legend: B images, P prefix tokens, H x W the patch grid, D the width of a layer.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, cast

import timm
import timm.layers
import torch
from torch import Tensor, nn

from students.images import RGB, check_images, normalise_images

Attention = Literal["auto", "sdpa", "explicit"]
Layer = tuple[Tensor, Tensor]
"""`(prefix [B, P, D], patches [B, H, W, D])`."""


def build_timm_model(architecture: str, model_args: dict[str, Any], *, device: Literal["cpu", "meta"]) -> nn.Module:
    """Return a timm model without pretrained weights, whatever default device is in force.

    Args:
        architecture: a name that `timm.create_model` takes.
        model_args: its keyword arguments.
        device: "meta" allocates nothing.

    Raises:
        ValueError: timm does not know the name or refuses an argument.
    """
    try:
        with torch.device(device):
            return timm.create_model(architecture, pretrained=False, **model_args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"timm {timm.__version__} cannot build {architecture!r} with {model_args}: {error}. "
            "Choose a name from timm.list_models() and arguments that its constructor takes."
        ) from error


def download_timm_weights(architecture: str, model_args: dict[str, Any]) -> dict[str, Tensor]:
    """Return timm's pretrained weights, loaded strictly, with a classifier of the size that `model_args` asks for.

    Args:
        architecture: a name that `timm.create_model` takes, with the tag of the weights.
        model_args: its keyword arguments.

    Raises:
        FileNotFoundError: the weights cannot be fetched.
        ValueError: timm has no weights of that name, or they do not fit the arguments.
    """
    # timm loads leniently, and leaves random what a file lacks, when it is told another number of classes than the
    # checkpoint's. So the model is built with the checkpoint's, and the classifier replaced afterwards.
    args = {key: value for key, value in model_args.items() if key != "num_classes"}
    way_out = (
        "Choose a name with a tag from timm.list_pretrained() and arguments that fit it, or download the file and give "
        "its path as `weights`."
    )
    try:
        # Building a model draws from the global generator, which belongs to the training run.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = cast(Any, timm.create_model(architecture, pretrained=True, **args))
            model.reset_classifier(model_args.get("num_classes", 0))
    except OSError as error:
        raise FileNotFoundError(
            f"timm could not fetch the pretrained weights of {architecture!r}: {error}. {way_out}"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"timm could not load the pretrained weights of {architecture!r}: {error}. {way_out}"
        ) from error
    return model.state_dict()


class TimmEncoder(nn.Module):
    """A timm model that normalises its own images and returns its last hidden states.

    The parameters stay on the meta device until `load_weights`, so any recipe can be built without its files.
    A subclass says where the weights come from by `read_weights`.

    Args:
        architecture: name that `timm.create_model` takes.
        model_args: keyword arguments that rebuild the model; plain JSON values.
        training_args: further keyword arguments that matter in training only, such as `drop_path_rate`.
        layout: which function the weights compute.
        img_size: pixels a side that the stored position embedding is for.
        patch_size: pixels a side of one cell of the last hidden state's grid.
        layer_dims: width of each hidden state, oldest first.
        normalisation: channel means and standard deviations.
        attention: see the students.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: timm refuses the arguments, or the model has no gradient checkpointing.
    """

    def __init__(
        self,
        architecture: str,
        model_args: dict[str, Any],
        *,
        training_args: dict[str, Any],
        layout: Literal["internvit", "clip", "timm"],
        img_size: int,
        patch_size: int,
        layer_dims: tuple[int, ...],
        normalisation: tuple[RGB, RGB],
        attention: Attention,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        self._architecture, self._model_args = architecture, model_args
        self._layout: Literal["internvit", "clip", "timm"] = layout
        self._img_size, self._patch_size, self._layer_dims = img_size, patch_size, layer_dims
        self._normalisation = normalisation
        self._attention: Attention = attention
        self._chosen_attention: Literal["sdpa", "explicit"] | None = None
        self.model = build_timm_model(architecture, {**model_args, **training_args}, device="meta")
        # A model may have a class token that only blocks after the hidden states read (XCiT, CaiT).
        has_prefix = "return_prefix_tokens" in inspect.signature(cast(Any, self.model).forward_intermediates).parameters
        self._num_prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0)) if has_prefix else 0
        if grad_checkpointing:
            self._enable_grad_checkpointing()

    def _enable_grad_checkpointing(self) -> None:
        try:
            cast(Any, self.model).set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"{self._architecture} has no gradient checkpointing in timm; set grad_checkpointing to false."
            ) from error

    @property
    def embed_dim(self) -> int:
        """Width of the last hidden state."""
        return self._layer_dims[-1]

    @property
    def depth(self) -> int:
        """How many hidden states can be had."""
        return len(self._layer_dims)

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Width of each hidden state, oldest first."""
        return self._layer_dims

    @property
    def patch_size(self) -> int:
        """Pixels a side of one cell of the last hidden state's grid."""
        return self._patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers in front of the patch tokens that the hidden states hold."""
        return self._num_prefix_tokens

    @property
    def image_mean(self) -> RGB:
        """Channel means, RGB, of images scaled to [0, 1]."""
        return self._normalisation[0]

    @property
    def image_std(self) -> RGB:
        """Channel standard deviations, RGB, of images scaled to [0, 1]."""
        return self._normalisation[1]

    @property
    def layout(self) -> Literal["internvit", "clip", "timm"]:
        """Which function the weights compute."""
        return self._layout

    @property
    def timm_architecture(self) -> str:
        """The name `timm.create_model` takes."""
        return self._architecture

    @property
    def timm_model_args(self) -> dict[str, Any]:
        """Keyword arguments that, with the name, rebuild the model; plain JSON values."""
        return dict(self._model_args)

    @property
    def timm_strides(self) -> dict[str, int]:
        """Strides that differ from timm's model, by module; see `students.TimmStudent`."""
        return {}

    @property
    def img_size(self) -> int:
        """Pixels a side that the stored position embedding is for."""
        return self._img_size

    @property
    def is_loaded(self) -> bool:
        """Whether the weights have been read, by `load_weights` or from a checkpoint."""
        return not any(parameter.is_meta for parameter in self.parameters())

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Return every weight under timm's key names, detached, sharing memory with the model.

        Raises:
            RuntimeError: the weights have not been loaded.
        """
        self._require_loaded()
        return {key: value.detach() for key, value in self.model.state_dict().items()}

    def read_weights(self) -> dict[str, Tensor]:
        """Return the weights named at construction, under timm's key names, float32, on the CPU."""
        raise NotImplementedError

    def load_weights(self) -> None:
        """Read the weights named at construction, strictly; a second call does nothing.

        Raises:
            FileNotFoundError: a weight file is missing.
            ValueError: a key or width does not fit, or a file is damaged.
        """
        if not self.is_loaded:
            self.model.load_state_dict(self.read_weights(), strict=True, assign=True)

    def _require_loaded(self) -> None:
        if not self.is_loaded:
            raise RuntimeError(f"The weights of {type(self).__name__} are not loaded. Call load_weights() first.")

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        """Return the outputs of the last `num_layers` blocks (or stages), oldest first, before any final norm.

        Args:
            images: `[B, 3, H, W]`, uint8 in [0, 255] or float in [0, 1], RGB, on the student's device. H and W may
                differ from `img_size`: positions are then resampled by timm.
            num_layers: from 1 to `depth`.

        Returns:
            `num_layers` pairs `(prefix [B, P, D], patches [B, H', W', D])`.

        Raises:
            RuntimeError: the weights have not been loaded.
            ValueError: the images have another shape or dtype, H or W is no multiple of the patch size, or
                `num_layers` is out of range.
        """
        self._require_loaded()
        if not 1 <= num_layers <= self.depth:
            raise ValueError(f"num_layers is {num_layers}; {self._architecture} has 1 to {self.depth} hidden states.")
        check_images(images, self._patch_size)
        dtype = next(self.parameters()).dtype
        self._choose_attention(images.device, dtype)
        pixels = normalise_images(images, self.image_mean, self.image_std, dtype)
        return self._forward_layers(pixels, num_layers)

    def _forward_layers(self, pixels: Tensor, num_layers: int) -> list[Layer]:
        model = cast(Any, self.model)
        if not self._num_prefix_tokens:
            maps: list[Tensor] = model.forward_intermediates(
                pixels, indices=num_layers, norm=False, intermediates_only=True
            )
            return [(x.new_zeros(x.shape[0], 0, x.shape[1]), x.permute(0, 2, 3, 1)) for x in maps]
        height, width = (side // self._patch_size for side in pixels.shape[-2:])
        tokens: list[tuple[Tensor, Tensor]] = model.forward_intermediates(
            pixels.contiguous(),  # channels-last costs patch embeddings of 32 px a tenth of a small ViT's step
            indices=num_layers,
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [(prefix, patches.unflatten(1, (height, width))) for patches, prefix in tokens]

    def attention_shape(self, img_size_px: int) -> tuple[int, int, int] | None:
        """Return heads, tokens and head width; None where `attention` is not auto, or the model's is not a ViT's."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, timm.layers.Attention)]
        if self._attention != "auto" or not layers or img_size_px % self._patch_size:
            return None
        tokens = (img_size_px // self._patch_size) ** 2 + self._num_prefix_tokens
        return layers[0].num_heads, tokens, layers[0].head_dim

    def use_attention(self, kernel: Literal["sdpa", "explicit"]) -> None:
        """Use this kernel from now on, if `attention` is auto."""
        self._chosen_attention = kernel

    def _choose_attention(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._attention == "auto" and self._chosen_attention is not None:
            is_fused = self._chosen_attention == "sdpa"
        elif self._attention == "auto":
            autocast = torch.is_autocast_enabled(device.type)
            compute_dtype = torch.get_autocast_dtype(device.type) if autocast else dtype
            # torch's fused kernel does not use the bf16 dot products of a CPU: explicit products are 1.4 to 2.9 times
            # as fast there (measured on AVX512-BF16), and slower or larger everywhere else.
            is_fused = not (device.type == "cpu" and compute_dtype == torch.bfloat16)
        else:
            is_fused = self._attention == "sdpa"
        for module in self.model.modules():
            if getattr(module, "fused_attn", is_fused) != is_fused:
                cast(Any, module).fused_attn = is_fused
