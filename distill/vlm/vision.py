"""The encoder of a small VLM: a run, an export, or whatever else `distill probe` can open."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from distill.checkpoint import load_student
from distill.encoder import Encoder
from distill.errors import ConfigError
from distill.probe.encoders import load_encoder, run_of

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class VisionConfig:
    """Which encoder, which of its hidden states, and whether it is trained.

    Attributes:
        path: a run directory, an export, a timm, open_clip or transformers directory, or a YAML file with `class_path`
            and `init_args`.
        layer: the hidden state that is read, counted from the end: -1 is the last block's output before any final norm.
            None: what the export's manifest names, else -1. MobileVLM and LLaVA read -2 of CLIP.
        tune: "frozen" (in eval mode, without gradients) or "full".
        which: of a run: the trained student, or its initialisation.
        student: of a run with several students: which one.

    Raises:
        ConfigError: `layer` is not negative, or `which` and `student` are given for something that is no run.
    """

    path: Path
    layer: int | None = None
    tune: Literal["frozen", "full"] = "frozen"
    which: Literal["last", "initial"] = "last"
    student: str | None = None

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer >= 0:
            raise ConfigError(
                f"vision.layer {self.layer} must be negative: hidden states are counted from the end, -1."
            )
        if (self.which != "last" or self.student is not None) and not _is_run(self.path):
            raise ConfigError(
                f"vision.which {self.which} and vision.student {self.student} choose among a run's students, and "
                f"{self.path} is no run directory. Name the run that the export was made from, or leave them out."
            )


def _is_run(path: Path) -> bool:
    return path.is_dir() and run_of(path) == path


def load_vision(config: VisionConfig) -> nn.Module:
    """Return the encoder with its weights, in eval mode on the CPU; frozen if the configuration says so.

    Returns:
        A module that offers `distill.encoder.Encoder`.

    Raises:
        ConfigError: the path is none of what can be opened, or the encoder has fewer layers than `layer` asks for.
        WeightsError: weights are missing, damaged or do not fit.
    """
    if _is_run(config.path):
        module = load_student(config.path, name=config.student, which=config.which)[1]
    else:
        module = load_encoder(config.path)
    depth = cast(Encoder, module).depth
    if -select_layer(config) > depth:
        raise ConfigError(
            f"vision.layer {select_layer(config)}: {config.path} has {depth} layers; take one from -{depth} to -1."
        )
    return module.requires_grad_(config.tune == "full").eval()


def select_layer(config: VisionConfig) -> int:
    """Return which hidden state is read, from the end: the one configured, or the manifest's, or -1.

    Raises:
        ConfigError: the manifest cannot be read.
    """
    if config.layer is not None:
        return config.layer
    file = config.path / MANIFEST
    if _is_run(config.path) or not file.is_file():
        return -1
    try:
        manifest = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        return int(manifest.get("features", manifest).get("select_layer", -1))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); export again, or set vision.layer.") from error


def patch_grid(encoder: Encoder, tile_size: int) -> tuple[int, int]:
    """Return (rows, columns) of the patches of a square tile.

    Args:
        encoder: whose patch size counts.
        tile_size: pixels a side.

    Raises:
        ConfigError: the tile is no whole number of patches.
    """
    patch = encoder.patch_size
    if tile_size < patch or tile_size % patch:
        low = max(1, tile_size // patch) * patch
        raise ConfigError(
            f"tile_size {tile_size} is no multiple of the encoder's patch_size {patch}; use {low} or {low + patch}."
        )
    return tile_size // patch, tile_size // patch
