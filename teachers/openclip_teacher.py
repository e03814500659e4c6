"""The image tower of any open_clip model as a frozen teacher; the text tower is never built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from teachers.frozen import WEIGHTS_RANDOM, Dtype, FrozenEncoder, freeze
from teachers.images import as_rgb
from teachers.openclip_config import (
    CONFIG_NAME,
    check_activation,
    pretrained_tag,
    read_model_config,
    recorded_normalisation,
)
from teachers.sources import find_file, resolve_directory, resolve_path
from teachers.timm_features import (
    TimmFeatures,
    channels_last,
    check_fixed_size,
    describe_features,
    read_hidden_states,
    without_prefix,
)
from teachers.weights import load_strictly, read_state_dict

_TOWER_PREFIX = "visual."
_DIRECTORY_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_RESNET_STRIDE = 32


class OpenClipTeacher(FrozenEncoder):
    """The frozen image tower of an open_clip model, native or from timm.

    A hidden state is what the tower's `forward_intermediates` gives before any final norm: of a ViT the output of
    each block with the class token as prefix, of a ResNet one feature map per stage.

    Args:
        model_name: a name of `open_clip.list_models()`, or `local-dir:<directory>`. None takes the directory in
            `weights`, which has an open_clip_config.json; that file is then read at construction.
        weights: a `.safetensors`, `.pt`, `.pth` or `.bin` file of the whole model (tensors under `visual.`) or of the
            image tower alone; a directory saved by open_clip; `"pretrained:<tag>"` for open_clip's own download
            (`"pretrained"` if the model has one tag only); `package:<name>/<path>`; or `"random"`.
        img_size: image side in pixels, if it is to differ from the model's own: the position embedding is then
            resized as open_clip does (bicubic, antialiased).
        image_mean: channel means the weights were trained with; None is what open_clip records for the directory or
            tag, or for all tags of the model if they agree.
        image_std: channel standard deviations, likewise.
        dtype: what the encoder computes in; also the dtype of its hidden states. "auto" is bfloat16 where that is fast.
        seed: of untrained weights.
        sha256: expected `weights_sha256` of the weights; None does not check. Not for `"pretrained"`.

    Raises:
        FileNotFoundError: the directory has no open_clip_config.json.
        ValueError: no such model or tag, or one that its weights do not fit.

    Example:
        >>> teacher = OpenClipTeacher("RN50", weights="random")
        >>> teacher.load_weights()
        >>> prefix, patches = teacher.forward_hidden_states(torch.zeros(1, 3, 64, 64), num_layers=1)[0]
        >>> prefix.shape, patches.shape
        (torch.Size([1, 0, 2048]), torch.Size([1, 2, 2, 2048]))
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        weights: str,
        img_size: int | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        dtype: Dtype = "float32",
        seed: int = 0,
        sha256: str | None = None,
    ) -> None:
        self.model_name, weights = resolve_directory(model_name, weights, CONFIG_NAME)
        super().__init__(weights=weights, dtype=dtype, sha256=sha256)
        self.img_size = img_size
        self.seed = seed
        self._config, preprocess = read_model_config(self.model_name)
        self._tag = pretrained_tag(self.model_name, weights)
        if self._tag is not None:
            check_activation(self.model_name, self._tag, self._config)
        with torch.device("meta"):
            self.visual = self._build()
            self._set_timm_size(self.visual)
        self._features = _describe_tower(self.visual, self.model_name, img_size)
        self._describe(self._features.layer_dims, self._features.patch_size, self._features.num_prefix_tokens)
        if not (preprocess or (image_mean and image_std)):
            preprocess = recorded_normalisation(self.model_name, self._tag)
        self.image_mean = as_rgb(image_mean or preprocess.get("mean"), "image_mean")
        self.image_std = as_rgb(image_std or preprocess.get("std"), "image_std")
        freeze(self)

    def _build(self) -> nn.Module:
        # open_clip's public constructors would build the text tower too, and for some models download its config.
        from open_clip.model import _build_vision_tower  # pyright: ignore[reportPrivateUsage]

        config = cast(dict[str, Any], self._config["vision_cfg"]) | {"timm_model_pretrained": False}
        if self.img_size is not None and "timm_model_name" not in config:
            config["image_size"] = self.img_size
        quick_gelu = bool(self._config.get("quick_gelu", False))
        return _build_vision_tower(int(self._config["embed_dim"]), cast(Any, config), quick_gelu)

    def _set_timm_size(self, tower: nn.Module) -> None:
        """Resize a timm tower, which is loaded at its own size first, as open_clip does."""
        if self.img_size is not None and hasattr(tower, "trunk"):
            if not hasattr(tower.trunk, "set_input_size"):
                raise ValueError(
                    f"img_size is {self.img_size}, but the image tower of {self.model_name!r} "
                    f"({type(tower.trunk).__name__}) has no size to set; remove img_size."
                )
            cast(Any, tower).set_input_size(self.img_size)

    def _load(self, device: torch.device) -> None:
        # Building a model draws its initial weights from the global generator, which belongs to the training run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            tower = self._build()
        if self.weights != WEIGHTS_RANDOM:
            path = self._find_file()
            tensors = read_state_dict(path, _TOWER_PREFIX)
            if self.img_size is not None:
                _resize_positions(tensors, tower)
            load_strictly(tower, tensors, path)
        self._set_timm_size(tower)
        self.visual = tower.to(device=device, dtype=self.dtype)

    def _find_file(self) -> Path:
        if self._tag is None:
            return find_file(resolve_path(self.weights), _DIRECTORY_WEIGHTS)
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg

        try:
            return Path(download_pretrained(get_pretrained_cfg(self.model_name, self._tag)))
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"open_clip could not fetch {self.model_name!r} with tag {self._tag!r}: {error}. Download the file and "
                "give its path as `weights`."
            ) from error

    def _check_size(self, height: int, width: int) -> None:
        check_fixed_size(height, width, self._features.fixed_size)
        super()._check_size(height, width)

    def _hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        trunk = getattr(self.visual, "trunk", None)
        if trunk is not None:
            return read_hidden_states(trunk, images, num_layers, self.num_prefix_tokens)
        outputs = cast(Any, self.visual).forward_intermediates(
            images,
            indices=num_layers,
            normalize_intermediates=False,
            intermediates_only=True,
            output_extra_tokens=self.num_prefix_tokens > 0,
        )
        maps = cast(list[Tensor], outputs["image_intermediates"])
        if not self.num_prefix_tokens:
            return [without_prefix(m) for m in maps]
        prefixes = cast(list[Tensor], outputs["image_intermediates_prefix"])
        return [(prefix, channels_last(m)) for prefix, m in zip(prefixes, maps, strict=True)]


def _describe_tower(tower: nn.Module, model_name: str, img_size: int | None) -> TimmFeatures:
    """Return the shape of the tower's hidden states, whichever of open_clip's three kinds it is."""
    native = cast(Any, tower)
    if hasattr(tower, "trunk"):
        return describe_features(native.trunk, model_name, img_size)
    if hasattr(tower, "transformer"):
        width, patch_size, image_size = native.conv1.out_channels, native.patch_size, native.image_size
        layers = len(native.transformer.resblocks)
        return TimmFeatures((int(width),) * layers, int(patch_size[0]), 1, (int(image_size[0]), int(image_size[1])))
    stages = [native.layer1, native.layer2, native.layer3, native.layer4]
    widths = [native.conv3.out_channels, *(stage[-1].conv3.out_channels for stage in stages)]
    return TimmFeatures(tuple(int(w) for w in widths), _RESNET_STRIDE, 0, None)


def _resize_positions(tensors: dict[str, Tensor], tower: nn.Module) -> None:
    """Resize the position embedding of a native ViT to the tower's grid, in place, by open_clip's own method."""
    from open_clip.model import resize_pos_embed

    if "positional_embedding" in tensors:
        renamed = {"visual.positional_embedding": tensors["positional_embedding"].float()}
        resize_pos_embed(renamed, SimpleNamespace(visual=tower))
        tensors["positional_embedding"] = renamed["visual.positional_embedding"]
