"""Any timm model as a frozen teacher: ViTs by their tokens, convolutional and hybrid models by their feature maps."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from teachers.efficientnet_keys import is_efficientnet_pytorch, to_timm_names
from teachers.fold_norms import fold_batch_norms
from teachers.frozen import WEIGHTS_PRETRAINED, WEIGHTS_RANDOM, Dtype, FrozenEncoder, freeze
from teachers.images import as_rgb
from teachers.sources import find_file, resolve_directory, resolve_path
from teachers.strides import measure_stride, set_strides
from teachers.timm_features import check_fixed_size, describe_features, read_hidden_states
from teachers.weights import read_state_dict

_DIRECTORY_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class TimmTeacher(FrozenEncoder):
    """A frozen timm model.

    A hidden state is what timm's `forward_intermediates` gives: of a ViT the output of each block with its prefix
    tokens, of other models one feature map per stage and no prefix. The classifier is no part of it: it is left out.

    Args:
        model_name: a name of `timm.list_models()`, with or without a pretrained tag, or `local-dir:<directory>`. None
            takes architecture, arguments and normalisation from the config.json of the directory in `weights`; that
            file is then read at construction.
        weights: a `.safetensors`, `.pth`, `.pt` or `.bin` file in timm's layout, in any layout that timm converts
            itself, or in that of `efficientnet-pytorch`; a directory saved by timm; `package:<name>/<path>` for a file
            inside an installed package; `"pretrained"` for timm's own download; or `"random"`.
        model_args: further arguments of `timm.create_model`, such as `dynamic_img_size: true`.
        img_size: image side in pixels for models with a fixed one: the position embedding is then resized as timm
            does (bicubic, antialiased). None is the model's own. Models that take any size refuse it.
        image_mean: channel means the weights were trained with; None is what timm records for the model.
        image_std: channel standard deviations, likewise.
        dtype: what the encoder computes in; also the dtype of its hidden states. "auto" is bfloat16 where that is fast.
        channel_order: of the images that the weights were trained with; image_mean and image_std are RGB either way.
        strides: strides that differ from timm's model, by the module's path: Keras' ResNet-50 has `layer2.0.conv1: 2,
            layer2.0.conv2: 1` and likewise in layers 3 and 4.
        seed: of untrained weights.
        sha256: expected `weights_sha256` of the weights; None does not check. Not for `"pretrained"`.

    Raises:
        FileNotFoundError: `model_name` is None and the directory has no config.json.
        ValueError: no such model, it gives no intermediate features, or an argument does not fit it.

    Example:
        >>> teacher = TimmTeacher("resnet18", weights="random")
        >>> teacher.load_weights()
        >>> prefix, patches = teacher.forward_hidden_states(torch.zeros(1, 3, 64, 64), num_layers=1)[0]
        >>> prefix.shape, patches.shape
        (torch.Size([1, 0, 512]), torch.Size([1, 2, 2, 512]))
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        weights: str,
        model_args: dict[str, Any] | None = None,
        img_size: int | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        dtype: Dtype = "float32",
        channel_order: Literal["rgb", "bgr"] = "rgb",
        strides: dict[str, int] | None = None,
        seed: int = 0,
        sha256: str | None = None,
    ) -> None:
        self.model_name, weights = resolve_directory(model_name, weights, "config.json")
        super().__init__(weights=weights, dtype=dtype, sha256=sha256)
        self.model_args = dict(model_args or {}) | ({} if img_size is None else {"img_size": img_size})
        self.seed, self.channel_order, self.strides = seed, channel_order, dict(strides or {})
        _check_model_name(self.model_name)
        with torch.device("meta"):
            self.model = self._create(num_classes=0)
        self._features = describe_features(self.model, self.model_name, self.model_args.get("img_size"))
        patch_size = measure_stride(self.model) if self.strides else self._features.patch_size
        self._describe(self._features.layer_dims, patch_size, self._features.num_prefix_tokens)
        recorded = cast(dict[str, Any], self.model.pretrained_cfg)
        self.image_mean = as_rgb(recorded["mean"] if image_mean is None else image_mean, "image_mean")
        self.image_std = as_rgb(recorded["std"] if image_std is None else image_std, "image_std")
        freeze(self)

    def _create(self, **overrides: Any) -> nn.Module:
        arguments: dict[str, Any] = self.model_args | overrides
        try:
            model = timm.create_model(self.model_name, **arguments)
        except TypeError as error:
            raise ValueError(
                f"timm model {self.model_name!r} refused its arguments {arguments}: {error}. Remove from `model_args` "
                "(or `img_size`) what it does not take; convolutional models take images of any size as they are."
            ) from error
        set_strides(model, self.strides, self.model_name)
        return model

    def _load(self, device: torch.device) -> None:
        # Building a model draws its initial weights from the global generator, which belongs to the training run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            if self.weights == WEIGHTS_RANDOM:
                model = self._create(num_classes=0)
            elif self.weights == WEIGHTS_PRETRAINED:
                model = self._download()
            else:
                model = self._read(find_file(resolve_path(self.weights), _DIRECTORY_WEIGHTS))
        cast(Any, model).reset_classifier(0)
        self.model = fold_batch_norms(model.float()).to(device=device, dtype=self.dtype)

    def _download(self) -> nn.Module:
        # Without `num_classes`, as timm loads leniently when that differs from the checkpoint's.
        try:
            return self._create(pretrained=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"timm could not fetch pretrained weights for {self.model_name!r}: {error}. Choose a name with a "
                "pretrained tag (timm.list_pretrained()), or download the file and give its path as `weights`."
            ) from error

    def _read(self, path: Path) -> nn.Module:
        tensors = read_state_dict(path)
        own_names = set(self.model.state_dict())
        if is_efficientnet_pytorch(tensors):
            tensors = to_timm_names(tensors, own_names)
        num_classes = int(self.model_args.get("num_classes", self._num_classes(tensors, own_names)))
        # timm's loader converts foreign layouts and resizes positions; it is strict as long as the number of classes
        # is the same on both sides.
        overlay: dict[str, Any] = {
            "state_dict": tensors,
            "source": "",
            "custom_load": False,
            "num_classes": num_classes,
        }
        try:
            model = self._create(num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: does not fit timm model {self.model_name!r} with {self.model_args}: {reason} Choose the "
                "model these weights are of."
            ) from error
        # timm keeps the overlay, and with it a second copy of every weight.
        model.pretrained_cfg = self.model.pretrained_cfg
        cast(Any, model).default_cfg = self.model.pretrained_cfg
        return model

    def _num_classes(self, tensors: dict[str, Tensor], own_names: set[str]) -> int:
        """Size of the classifier in the file: it has to be there for strict loading, and is dropped afterwards."""
        recorded = cast(dict[str, Any], self.model.pretrained_cfg)
        classifiers = recorded.get("classifier") or ()
        for name in [classifiers] if isinstance(classifiers, str) else classifiers:
            if f"{name}.weight" in tensors:
                return tensors[f"{name}.weight"].shape[0]
        is_timm_layout = not own_names.isdisjoint(tensors)
        return 0 if is_timm_layout else int(recorded.get("num_classes") or 0)

    def _check_size(self, height: int, width: int) -> None:
        check_fixed_size(height, width, self._features.fixed_size)
        super()._check_size(height, width)

    def _hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        if self.channel_order == "bgr":
            images = images.flip(1)
        return read_hidden_states(self.model, images, num_layers, self.num_prefix_tokens)


def _check_model_name(name: str) -> None:
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise ValueError(
            f"model_name {name!r} is no timm model; near it are {', '.join(near) or 'none'}. "
            "timm.list_models('*part of a name*') lists all."
        )
