"""What a small VLM's recipe says: encoder, connector, language model, and the stages that train them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jsonargparse import ArgumentParser

from distill.errors import ConfigError
from distill.vlm.connectors import ConnectorConfig
from distill.vlm.conversation import Kind
from distill.vlm.language import LanguageConfig
from distill.vlm.recipe_files import merge_words
from distill.vlm.tiling import Tiling
from distill.vlm.vision import VisionConfig

Part = Literal["vision", "connector", "language"]
Trained = Literal["vision", "connector", "language", "norms"]

POSITIVE = ("steps", "global_batch_size", "micro_batch_size", "max_length")


def check_range(settings: object, whose: str, *, positive: Sequence[str], not_negative: Sequence[str]) -> None:
    """Refuse numbers out of range; None is always in range.

    Args:
        settings: has them as attributes.
        whose: how a message begins.
        positive: names of those that must be at least 1.
        not_negative: names of those that must be finite and at least 0.

    Raises:
        ConfigError: naming the number.
    """
    for name in (*positive, *not_negative):
        value, least = getattr(settings, name), 1 if name in positive else 0
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{whose} {name} {value} must be a finite number from {least}.")


@dataclass
class SourceConfig:
    """One source of training data.

    Args:
        path: the records: .jsonl, .json, .tsv (captions), .txt or a folder of them, or WebDataset shards.
        kind: what the records are.
        image_folder: where the records' image names start; null means the folder of `path`.
        caption_prompt: what is asked of a captioned image; empty asks nothing.
        weight: share of the source in training, relative to the others of the stage; 0 leaves it out.
    """

    path: Path
    kind: Kind = "instruction"
    image_folder: Path | None = None
    caption_prompt: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, f"The source {self.path}:", positive=(), not_negative=("weight",))


@dataclass
class StageConfig:
    """One stage of training: which parts learn, from what, and how fast.

    Args:
        lr: peak learning rate of each part that the stage trains, of vision, connector and language; the others are
            frozen. Of a language model with LoRA, adapters are trained, and norms where `language.train_norms` says
            so; the key norms, without language, trains the norms alone. null is as if the part were not named.
        data: sources by name.
        steps: optimiser steps; null means as many as `epochs` need.
        epochs: passes over the data, where `steps` is null.
        global_batch_size: samples an optimiser step, over all devices.
        micro_batch_size: samples a device takes at a time; null means its whole share of the step.
        max_length: most tokens of a row; longer samples are cut at their end, or refused where that would cut an image.
        pack: put several samples into a row.
        tiling: how this stage cuts images; null means as the recipe says.
        template: how conversations become text in this stage; null means as the recipe says.
        weight_decay: decoupled, of matrices only.
        betas: AdamW's moment decays.
        warmup_fraction: share of the steps with linear warm-up.
        final_fraction: learning rate at the end, relative to the peak; the decay is a cosine.
        gradient_clip: largest norm of the gradient; null does not clip.

    Raises:
        ConfigError: a value is out of range.
    """

    lr: dict[Trained, float | None]
    data: dict[str, SourceConfig]
    steps: int | None = None
    epochs: float = 1.0
    global_batch_size: int = 128
    micro_batch_size: int | None = None
    max_length: int = 2048
    pack: bool = False
    tiling: Tiling | None = None
    template: str | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = 0.03
    final_fraction: float = 0.0
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_range(self, "A stage's", positive=POSITIVE, not_negative=("epochs", "weight_decay", "gradient_clip"))
        unknown = [part for part in self.lr if part not in get_args(Trained)]
        if unknown:
            raise ConfigError(f"A stage's lr names {unknown[0]!r}; the parts are {', '.join(get_args(Trained))}.")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates.values()):
            raise ConfigError(f"A stage's lr {self.lr} must give at least one part a finite rate above 0.")
        if not self.data or not any(source.weight > 0 for source in self.data.values()):
            raise ConfigError("A stage's data must name at least one source with a weight above 0.")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"A stage's {name} {getattr(self, name)} must be from 0 to 1.")
        micro = self.micro_batch_size
        if micro is not None and self.global_batch_size % micro:
            raise ConfigError(
                f"A stage's global_batch_size {self.global_batch_size} is no multiple of its micro_batch_size {micro}."
            )

    @property
    def rates(self) -> dict[Trained, float]:
        """Peak learning rate of what is trained."""
        return {part: float(rate) for part, rate in self.lr.items() if rate is not None}


@dataclass
class TrainerConfig:
    """Where training runs.

    Args:
        accelerator: Lightning's name; auto takes a GPU where there is one.
        precision: Lightning's name; null takes bf16-mixed where that is fast, else 32-true.
        checkpoint_every: optimiser steps between two saves.
        num_workers: processes that read and tile images; 0 does it in this one.
        keep_samples: so many samples stay in memory, a process, once they are read and tiled: for small data sets.
        log_every: optimiser steps between two lines of metrics.csv.
        progress: whether a progress bar is shown.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    precision: str | None = None
    checkpoint_every: int = 500
    num_workers: int = 0
    keep_samples: int = 0
    log_every: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        check_range(
            self, "trainer's", positive=("checkpoint_every", "log_every"), not_negative=("num_workers", "keep_samples")
        )


@dataclass
class VLMRecipe:
    """A small VLM and its training.

    Args:
        run_dir: the folder that the run writes to.
        vision: the encoder: the one line that changes when encoders are compared.
        connector: between encoder and language model.
        language: the language model.
        stages: by name, in the order in which they run.
        template: how conversations become text.
        tiling: how images are cut.
        image_token: the token that stands for one image embedding; null means the template's.
        max_new_tokens: longest answer when the model is scored.
        noise_features: replace the encoder's features by noise of the same mean and spread: the control that shows what
            a score owes to the encoder.
        trainer: where training runs.
        seed: of initial weights, of the order of the data and of dropout.
    """

    run_dir: Path
    vision: VisionConfig
    connector: ConnectorConfig
    language: LanguageConfig
    stages: dict[str, StageConfig]
    template: str = "internvl"
    tiling: Tiling = field(default_factory=Tiling)
    image_token: str | None = None
    max_new_tokens: int = 32
    noise_features: bool = False
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "The recipe's", positive=("max_new_tokens",), not_negative=("seed",))
        if not self.stages:
            raise ConfigError("The recipe has no stages; name at least one under the key stages.")

    @property
    def last_stage(self) -> StageConfig:
        """The stage after which the model is scored."""
        return list(self.stages.values())[-1]


def read_recipe(words: Sequence[str]) -> tuple[VLMRecipe, dict[str, Any]]:
    """Return the recipe of `--config=FILE` and `--key=VALUE` words, and the plain mapping that it was read from.

    Raises:
        ConfigError: a file or flag cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    content = merge_words(words)
    return build_recipe(content), content


def build_recipe(content: Mapping[str, Any]) -> VLMRecipe:
    """Return the recipe that a plain mapping holds.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=VLMRecipe)
    try:
        # A copy: parsing changes what it is given.
        parsed = parser.parse_object({"recipe": deepcopy(dict(content))}, defaults=False)
        return cast(VLMRecipe, cast(Any, parser).instantiate(parsed)["recipe"])
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises its own and what the classes raise
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from error
        raise ConfigError(f"The recipe cannot be used. {error}") from error
