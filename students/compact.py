"""Smaller students by their timm name: plain ViTs, hybrids, convolutional networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from students.images import RGB, nearest_sizes
from students.init import resize_position_embedding
from students.random_init import RandomInit, build_random_model
from students.strides import measure_layers, set_strides
from students.timm_encoder import Attention, TimmEncoder, build_timm_model, download_timm_weights
from students.weight_files import read_state_dict


class TimmStudent(TimmEncoder):
    """Any timm model that offers `forward_intermediates`, without its classifier.

    A hidden state is the output of a block in a ViT and of a stage in a convolutional or hybrid network, whose maps
    have no prefix tokens and may differ in width and grid. Parameters that no hidden state depends on (final norm,
    head) are found by differentiating the model once without data, and frozen, so that distributed training finds
    every trained parameter used.

    Args:
        model_name: architecture in `timm.list_models()`, with a tag after a dot when the weights are "pretrained".
        weights: a file or directory with timm's key names (a timm `local-dir` too); or "pretrained", timm's own hub
            download; or "random". A classifier in the file is left out; positions are resized to `img_size`.
        img_size: pixels a side; none means the model's own. Models of a fixed input size are built for it, others
            take any size.
        model_args: further keyword arguments of `timm.create_model`; plain JSON values.
        strides: strides that differ from timm's model, by module, such as `stages.3.downsample.conv2.conv: 1`
            for MobileSAM's TinyViT. Exports that hold the whole graph (onnx, pt2, executorch) keep them; timm has no
            argument for them, so the timm export refuses such a student.
        frozen: modules that keep their weights, such as `[patch_embed, stages.0]`: no gradient is computed for them
            and their batch norms keep their statistics. Where these are the first ones, a step saves their backward
            pass.
        init: for random weights: "timm", or, for ViTs, "mimetic" (arXiv 2305.09828).
        seed: of random weights.
        drop_path_rate: stochastic depth; none leaves the model's own.
        attention: "auto" is explicit matrix products for bfloat16 on a CPU and torch's fused kernel elsewhere;
            "sdpa" and "explicit" fix it.
        grad_checkpointing: recompute blocks in the backward pass instead of keeping their activations, where timm's
            model supports it.

    Raises:
        ValueError: timm does not know the name, refuses an argument, or the model has no `forward_intermediates`;
            `strides` or `frozen` names no module of it.

    Example:
        >>> import torch
        >>> student = TimmStudent("test_convnext", weights="random")
        >>> student.load_weights()
        >>> prefix, patches = student.forward_hidden_states(torch.zeros(1, 3, 64, 64), num_layers=1)[0]
        >>> prefix.shape, patches.shape
        (torch.Size([1, 0, 64]), torch.Size([1, 2, 2, 64]))
    """

    def __init__(
        self,
        model_name: str,
        weights: str,
        img_size: int | None = None,
        model_args: dict[str, Any] | None = None,
        *,
        strides: dict[str, int] | None = None,
        frozen: list[str] | None = None,
        init: RandomInit = "timm",
        seed: int = 0,
        drop_path_rate: float | None = None,
        attention: Attention = "auto",
        grad_checkpointing: bool = False,
    ) -> None:
        config = _pretrained_config(model_name)
        size = img_size or int(config.input_size[-1])
        args: dict[str, Any] = {"num_classes": 0, **(model_args or {})}
        if config.fixed_input_size:
            args.setdefault("img_size", size)
        template = build_timm_model(model_name, args, device="meta")
        if hasattr(template, "dynamic_img_size"):
            args.setdefault("dynamic_img_size", True)
        layers = _feature_layers(template, model_name)
        if strides:
            set_strides(template, strides, model_name)
            layers = measure_layers(template, size)
        if size % layers[-1][1]:
            raise ValueError(
                f"img_size {size} is not a multiple of {layers[-1][1]}, the stride of {model_name}; "
                f"use {nearest_sizes(size, layers[-1][1])}."
            )
        super().__init__(
            model_name,
            args,
            training_args={} if drop_path_rate is None else {"drop_path_rate": drop_path_rate},
            layout="timm",
            img_size=size,
            patch_size=layers[-1][1],
            layer_dims=tuple(width for width, _ in layers),
            normalisation=(cast(RGB, tuple(config.mean)), cast(RGB, tuple(config.std))),
            attention=attention,
            grad_checkpointing=grad_checkpointing,
        )
        set_strides(self.model, strides or {}, model_name)
        self._weights, self._seed, self._strides = weights, seed, dict(strides or {})
        self._init: RandomInit = init
        self._unused = _freeze_unused_parameters(self.model, size)
        self._frozen = tuple(frozen or ())
        for path in self._frozen:
            _named_module(self.model, path, model_name).requires_grad_(False)
        self.train()  # Lightning keeps the modes that it finds
        _fill_constant_buffers(self.model, model_name, args)

    @property
    def timm_strides(self) -> dict[str, int]:
        """Strides that differ from timm's model, by module."""
        return dict(self._strides)

    def train(self, mode: bool = True) -> TimmStudent:
        """Switch between training and evaluation; frozen modules stay in evaluation."""
        super().train(mode)
        for path in self._frozen:
            self.model.get_submodule(path).eval()
        return self

    def read_weights(self) -> dict[str, Tensor]:
        """Return the named weights under timm's keys, without a classifier.

        Raises:
            FileNotFoundError: a weight file is missing, or "pretrained" weights cannot be fetched.
            ValueError: a tensor is missing, left over or of another shape, or the file is of another model.
        """
        name, args = self.timm_architecture, self.timm_model_args
        if self._weights == "random":
            return build_random_model(name, args, init=self._init, seed=self._seed).state_dict()
        if self._weights == "pretrained":
            own = self.model.state_dict().keys()
            # A classifier that was replaced may leave layers in front of it that one never built does not have.
            return {key: value for key, value in download_timm_weights(name, args).items() if key in own}
        return self._read_file()

    def _read_file(self) -> dict[str, Tensor]:
        _check_architecture(Path(self._weights), self.timm_architecture)
        own = self.model.state_dict()
        stored = {key.removeprefix("model."): value for key, value in read_state_dict(self._weights).items()}
        state = {key: value for key, value in stored.items() if key in own or not self._is_classifier(key)}
        absent = own.keys() - state.keys()
        if absent and absent <= self._unused:
            # No hidden state depends on them, so a file without them is complete for this purpose.
            fresh = build_random_model(self.timm_architecture, self.timm_model_args, init="timm", seed=self._seed)
            state |= {key: value for key, value in fresh.state_dict().items() if key in absent}
        grid = self.img_size // self.patch_size
        if "pos_embed" in state and own["pos_embed"].ndim == state["pos_embed"].ndim == 3:
            # Class token and registers have a position each in some models and none in others.
            num_prefix = own["pos_embed"].shape[1] - grid * grid
            if 0 <= num_prefix <= self.num_prefix_tokens:
                state["pos_embed"] = resize_position_embedding(state["pos_embed"], grid, num_prefix)
        self._check_fit(state, own)
        # A copy each, in the model's dtype: files are often float16, and may share memory between names.
        return {key: torch.empty_like(own[key], device="cpu").copy_(value) for key, value in state.items()}

    def _is_classifier(self, key: str) -> bool:
        classifier = _pretrained_config(self.timm_architecture).classifier or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(cast(tuple[str, ...], classifier))
        return any(key.startswith(f"{name}.") for name in names)

    def _check_fit(self, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
        if not (missing or unknown or wrong):
            return
        detail = "; ".join(
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if keys
        )
        shapes = f" {wrong[0]} is {list(state[wrong[0]].shape)}, needed {list(own[wrong[0]].shape)}." if wrong else ""
        raise ValueError(
            f"The weights {self._weights} do not fit timm's {self.timm_architecture}: tensors {detail}.{shapes} "
            "Set model_name, img_size and model_args to those the file was made with."
        )


def _pretrained_config(model_name: str) -> Any:
    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True) if timm.is_model(model_name) else None
    if config is None:
        near = timm.list_models(f"*{model_name.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(
            f"model_name {model_name!r} is not an architecture of timm {timm.__version__}; "
            f"choose from timm.list_models(), for example {', '.join(near) or 'vit_small_patch16_224'}."
        )
    return config


def _feature_layers(model: nn.Module, model_name: str) -> list[tuple[int, int]]:
    """Return width and stride of each hidden state, oldest first."""
    info: Any = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not info:
        raise ValueError(f"timm's {model_name} has no forward_intermediates; choose another model_name.")
    entries = cast(list[dict[str, Any]], info if isinstance(info, list) else info.info)
    return [(int(entry["num_chs"]), int(entry["reduction"])) for entry in entries]


def _named_module(model: nn.Module, path: str, model_name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if not path or path not in modules:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"frozen names {path!r}: no such module in timm's {model_name}, which has {children}.")
    return modules[path]


def _freeze_unused_parameters(model: nn.Module, img_size: int) -> frozenset[str]:
    """Freeze the parameters that the last hidden state does not depend on; return the names of their tensors.

    The model is on the meta device, where a forward and a backward pass cost no arithmetic and no memory. What the
    last hidden state depends on is what any set of hidden states that holds it depends on.
    """
    images = torch.empty(1, 3, img_size, img_size, device="meta")
    named = dict(model.named_parameters())
    with torch.enable_grad():  # the caller may have switched gradients off
        features: list[Tensor] = cast(Any, model).forward_intermediates(
            images, indices=1, norm=False, intermediates_only=True
        )
        gradients = cast(
            tuple[Tensor | None, ...],
            torch.autograd.grad(features[-1].sum(), list(named.values()), allow_unused=True),
        )
    unused = {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
    for name in unused:
        named[name].requires_grad_(False)
    used_modules = {name.rpartition(".")[0] for name in named.keys() - unused}
    unused_modules = {name.rpartition(".")[0] for name in unused} - used_modules
    buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in unused_modules}
    return frozenset(unused | buffers)


def _fill_constant_buffers(model: nn.Module, model_name: str, args: dict[str, Any]) -> None:
    """Give real values to buffers that are computed at construction and stored in no state dict."""
    stored = model.state_dict().keys()
    constants = [name for name, _ in model.named_buffers() if name not in stored]
    if not constants:
        return
    source = dict(build_random_model(model_name, args, init="timm", seed=0).named_buffers())
    for name in constants:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, source[name], persistent=False)


def _check_architecture(path: Path, model_name: str) -> None:
    config = path / "config.json"
    if not config.is_file():
        return
    try:
        stored: object = json.loads(config.read_text(encoding="utf-8")).get("architecture")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a timm config: {error}. Fetch the directory again.") from error
    if stored is not None and stored != model_name.split(".")[0]:
        raise ValueError(f"{config} says architecture {stored!r}; model_name is {model_name!r}. Set model_name to it.")
