"""The shapes of the InternViT releases, and how to read them from a release's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

SUPPORTED_ACTIVATION = "gelu"


@dataclass(frozen=True)
class InternViTConfig:
    """Everything that determines the function InternViT computes.

    The defaults are InternViT-6B-448px-V1-5. Source: InternVL2.5 report (arXiv 2412.05271, table 1) and
    `configuration_intern_vit.py` of the InternVL repository.

    Args:
        embed_dim: width of the hidden states.
        depth: number of transformer blocks in the checkpoint.
        num_heads: attention heads; divides `embed_dim`.
        mlp_dim: width inside the MLP.
        patch_size: side of a patch, in pixels.
        img_size: side of the images the stored position embedding is for, in pixels.
        norm_type: `rms_norm` (6B) or `layer_norm` (300M), before attention and MLP.
        norm_eps: epsilon of every norm.
        qk_norm: RMS norm of queries and keys over the full width, all heads together, not per head.
        qkv_bias: whether the joint q/k/v projection has a bias.
        init_values: LayerScale of untrained weights; loaded weights bring their own.
    """

    embed_dim: int = 3200
    depth: int = 45
    num_heads: int = 25
    mlp_dim: int = 12800
    patch_size: int = 14
    img_size: int = 448
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    init_values: float = 0.1

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}.")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}.")
        if self.norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(f"norm_type is {self.norm_type!r}; use 'rms_norm' or 'layer_norm'.")

    @property
    def grid_size(self) -> int:
        """Patches a side that the stored position embedding is for."""
        return self.img_size // self.patch_size

    @classmethod
    def from_release_config(cls, config: dict[str, Any]) -> InternViTConfig:
        """Return the architecture that a release's config.json describes.

        Args:
            config: the parsed file, of the encoder itself or of a whole InternVL model (then its `vision_config` is
                read). Absent keys have the default of the release's own configuration class, as writers leave
                defaults out.

        Raises:
            ValueError: the config describes another function than InternViT, or a value has the wrong type.
        """
        nested = config.get("vision_config")
        config = cast(dict[str, Any], nested) if isinstance(nested, dict) else config
        if config.get("model_type") == "internvl_vision" or "use_qk_norm" in config:
            raise ValueError(
                "config is in the transformers-native layout (model_type 'internvl_vision'), whose weights have other "
                "names; use the original release, or convert it with InternVL's tools/internvl_hf2custom.py."
            )
        activation = config.get("hidden_act", SUPPORTED_ACTIVATION)
        if activation != SUPPORTED_ACTIVATION:
            raise ValueError(f"hidden_act is {activation!r}; every InternViT release has {SUPPORTED_ACTIVATION!r}.")
        values = {name: config.get(key, default) for name, (key, default) in _RELEASE_KEYS.items()}
        for name in ("img_size", "patch_size"):
            if isinstance(values[name], list):
                values[name] = _square(_RELEASE_KEYS[name][0], cast(list[object], values[name]))
        for name, value in values.items():
            key, default = _RELEASE_KEYS[name]
            if type(value) is int and isinstance(default, float):
                values[name] = float(value)
            elif type(value) is not type(default):
                raise ValueError(f"{key} is {value!r}; expected {type(default).__name__}.")
        return cls(**values)

    @classmethod
    def from_directory(cls, directory: Path) -> InternViTConfig:
        """Return the architecture that `directory/config.json` describes.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it is no JSON object, or describes no InternViT.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; copy the release's config.json beside its weights.")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("not a JSON object.")
            return cls.from_release_config(cast(dict[str, Any], config))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_equals(self, release: InternViTConfig, source: Path) -> None:
        """Refuse a checkpoint whose config differs in any field that changes what its weights compute.

        Args:
            release: what the checkpoint's config.json says.
            source: that file, for the message.

        Raises:
            ValueError: a field differs; the message has its name in the file, and both values.
        """
        for field in fields(self):
            # LayerScale is among the loaded weights, so its initial value is without effect.
            expected, found = getattr(self, field.name), getattr(release, field.name)
            if field.name != "init_values" and expected != found:
                raise ValueError(
                    f"{source}: {_RELEASE_KEYS[field.name][0]} is {found!r}, but the architecture asked for has "
                    f"{field.name} {expected!r}; set `architecture` to the release these weights are of, or build "
                    "from the file itself with InternViT.from_directory."
                )


_RELEASE_KEYS: dict[str, tuple[str, Any]] = {
    "embed_dim": ("hidden_size", 3200),
    "depth": ("num_hidden_layers", 48),
    "num_heads": ("num_attention_heads", 25),
    "mlp_dim": ("intermediate_size", 12800),
    "patch_size": ("patch_size", 14),
    "img_size": ("image_size", 224),
    "norm_type": ("norm_type", "rms_norm"),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "qk_norm": ("qk_normalization", True),
    "qkv_bias": ("qkv_bias", False),
    "init_values": ("initializer_factor", 0.1),
}
"""Our field -> (key in config.json, default of the release's `InternVisionConfig`)."""


def _square(key: str, sizes: list[object]) -> object:
    if len(set(sizes)) != 1:
        raise ValueError(f"{key} is {sizes!r}; only square images and patches are supported.")
    return sizes[0]


@dataclass(frozen=True)
class InternViTRelease:
    """A published checkpoint: its architecture, and the hidden state it is meant to be read at.

    Args:
        config: the architecture.
        select_layer: index into the hidden states as in the release's model card; -1 is the last block.
    """

    config: InternViTConfig
    select_layer: int = -1


_CONFIG_300M = InternViTConfig(
    embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096, norm_type="layer_norm", qk_norm=False, qkv_bias=True
)

INTERNVIT_RELEASES: dict[str, InternViTRelease] = {
    # The last 3 of 48 blocks are fitted to the contrastive loss, so the cards say to read layer -4; later releases
    # come without them.
    "InternViT-6B-224px": InternViTRelease(InternViTConfig(depth=48, img_size=224), select_layer=-4),
    "InternViT-6B-448px-V1-0": InternViTRelease(InternViTConfig(depth=48), select_layer=-4),
    "InternViT-6B-448px-V1-2": InternViTRelease(InternViTConfig()),
    "InternViT-6B-448px-V1-5": InternViTRelease(InternViTConfig()),
    "InternViT-6B-448px-V2_5": InternViTRelease(InternViTConfig()),
    "InternViT-300M-448px": InternViTRelease(_CONFIG_300M),
    "InternViT-300M-448px-V2_5": InternViTRelease(_CONFIG_300M),
}
"""The published checkpoints by the name OpenGVLab gives them."""


def resolve_release(architecture: str | InternViTConfig) -> InternViTRelease:
    """Return the release of that name, or the one that a config is of.

    A config that no release has is read at its last block.

    Raises:
        ValueError: no release has this name; the message lists those that exist.
    """
    if isinstance(architecture, InternViTConfig):
        known = (release for release in INTERNVIT_RELEASES.values() if release.config == architecture)
        return next(known, InternViTRelease(architecture))
    if architecture not in INTERNVIT_RELEASES:
        raise ValueError(
            f"architecture is {architecture!r}; known releases are {', '.join(INTERNVIT_RELEASES)}. "
            "For another shape give the fields of InternViTConfig."
        )
    return INTERNVIT_RELEASES[architecture]
