"""From a recipe to a model, a tokenizer and samples that fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from distill.vlm.building import build_small_vlm
from distill.vlm.chat import Tokenizer
from distill.vlm.conversation import Conversation
from distill.vlm.mixture import MixtureDataset
from distill.vlm.model import SmallVLM
from distill.vlm.planned_samples import PlannedSamples
from distill.vlm.recipe import Part, SourceConfig, StageConfig, VLMRecipe
from distill.vlm.records import read_records
from distill.vlm.runs import VLMRun, load_kept, trained_state
from distill.vlm.samples import SampleBuilder
from distill.vlm.templates import IMAGE_TOKEN, find_template
from distill.vlm.tokens import add_special_tokens, load_tokenizer
from distill.vlm.trained import kept_names, part_of
from distill.weights_fingerprint import weights_fingerprint

MAX_PROMPT = 2**20
"""Tokens; prompts are never cut."""

FILE_PARTS: tuple[Part, ...] = ("vision", "language")
"""The parts whose weights come from files of their own."""


@dataclass(frozen=True)
class BuiltVLM:
    """A model and what feeds it.

    Attributes:
        model: with the weights of its parts' files.
        tokenizer: knows the template's tokens and the image token.
        recipe: what it was built from.
        tunable: names of the parameters that the parts' own `tune` leaves to be trained.
        fingerprints: of the parts whose weights come from files.
    """

    model: SmallVLM
    tokenizer: Tokenizer
    recipe: VLMRecipe
    tunable: frozenset[str]
    fingerprints: Mapping[str, str]

    @property
    def pad_id(self) -> int:
        """Token id of the padding."""
        return int(self.tokenizer.pad_token_id)

    def sample_builder(self, stage: StageConfig, max_length: int | None = None) -> SampleBuilder:
        """Return what makes samples of conversations for this model, as a stage has them.

        Args:
            stage: whose tiling, template and length count.
            max_length: another length.

        Raises:
            ConfigError: the encoder or the connector cannot take tiles of this size.
        """
        recipe = self.recipe
        tiling, template = stage.tiling or recipe.tiling, stage.template or recipe.template
        tokens = self.model.tokens_per_tile(tiling.tile_size)
        length = max_length or stage.max_length
        return SampleBuilder(self.tokenizer, template, tiling, tokens, length, recipe.image_token)

    def prompt_builder(self) -> SampleBuilder:
        """Return what makes the prompts that the trained model is asked with: as its last stage has them, uncut."""
        return self.sample_builder(self.recipe.last_stage, MAX_PROMPT)

    def open_samples(self, stage_name: str) -> PlannedSamples:
        """Open the sources of a stage.

        Raises:
            ConfigError: a source is of the wrong kind or a weight cannot be.
            DataError: a file is missing or a record is not as it must be.
        """
        stage = self.recipe.stages[stage_name]
        used = {name: source for name, source in stage.data.items() if source.weight > 0}
        sources = {name: open_source(source) for name, source in used.items()}
        mixture = MixtureDataset(
            sources, {name: float(source.weight) for name, source in used.items()}, self.recipe.seed
        )
        return PlannedSamples(mixture, self.sample_builder(stage), self.recipe.trainer.keep_samples)


def open_source(source: SourceConfig) -> Sequence[Conversation]:
    """Return the records of a source; errors as in `read_records`."""
    return read_records(source.path, source.kind, source.image_folder, caption_prompt=source.caption_prompt)


def build_vlm(recipe: VLMRecipe, *, noise_features: bool | None = None) -> BuiltVLM:
    """Build a recipe's model on the CPU; equal recipes give equal weights.

    Args:
        recipe: what to build.
        noise_features: None takes the recipe's; True replaces the encoder's features by noise.

    Raises:
        ConfigError: a path or option cannot be used, or the parts do not fit.
        WeightsError: weights are missing, damaged or do not fit.
    """
    tokenizer = load_tokenizer(recipe.language.path, find_template(recipe.template), recipe.image_token)
    for stage in recipe.stages.values():
        add_special_tokens(tokenizer, find_template(stage.template or recipe.template), recipe.image_token)
    image_token_id = int(tokenizer.convert_tokens_to_ids(recipe.image_token or IMAGE_TOKEN))
    torch.manual_seed(recipe.seed)
    model = build_small_vlm(
        recipe.vision,
        recipe.connector,
        recipe.language,
        tile_size=recipe.tiling.tile_size,
        image_token_id=image_token_id,
        vocabulary_size=len(tokenizer),
        noise_features=recipe.noise_features if noise_features is None else noise_features,
    )
    tunable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    fingerprints = {part: weights_fingerprint(cast(nn.Module, getattr(model, part))) for part in FILE_PARTS}
    return BuiltVLM(model, tokenizer, recipe, tunable, fingerprints)


def load_trained(run: VLMRun, *, noise_features: bool = False) -> BuiltVLM:
    """Return a finished run's model, in eval mode on the CPU.

    Args:
        run: of `distill vlm fit`.
        noise_features: replace the encoder's features by noise, whatever the recipe says.

    Raises:
        ConfigError: the run is not finished, or a path of its recipe is gone.
        WeightsError: weights are missing, damaged or not those that the run began with.
    """
    folder = run.final_stage()
    recipe = run.recipe()
    built = build_vlm(recipe, noise_features=noise_features or recipe.noise_features)
    expected = kept_names(built.model, recipe.stages.values(), built.tunable)
    if not recipe.noise_features:
        # Noise that was not trained with takes its mean and spread from the first questions.
        expected = frozenset(key for key in expected if part_of(key) != "noise")
    load_kept(built.model, trained_state(folder, built.fingerprints), expected, str(folder))
    built.model.eval()
    return built
