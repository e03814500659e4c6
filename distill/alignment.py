"""One student and one teacher: layer pairing, heads, standardiser and loss.

Legend: B images, N tokens, D the teacher's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import Encoder, Layer
from distill.errors import ConfigError
from distill.heads import HeadKind, build_head
from distill.hidden_states import match_grids, pair_last_layers, patch_tokens, shared_prefix
from distill.losses import Loss, NegativeCosine
from distill.projected_cosine import projected_cosine
from distill.standardise import ROTATING, FeatureStatistics, StandardiseMode, Standardiser


@dataclass
class AlignmentConfig:
    """How a student is aligned with a teacher. None of these values is published: the defaults are this project's.

    Args:
        student: name of the student in the recipe.
        teacher: name of the teacher in the recipe.
        num_layers: K, the last hidden states compared. With 2 or more, the one before the last is trained too, which
            LLaVA-like consumers read.
        head: "linear", "layer_norm_linear", "mlp" or "none", one head for each paired layer.
        loss: by class_path, for example distill.losses.SmoothL1; null means distill.losses.NegativeCosine.
        standardise: what is done to the teacher's tokens: "none", "mean_std", "phi_s", or "procrustes", which gives
            them the student's width and axes, for head "none"; see `distill.standardise.Standardiser`.
        whitening: for "phi_s" and "procrustes", from 0 to 1: how far the teacher's directions are brought to the same
            variance.
        prefix_weight: share of the loss, from 0 to 1, that goes to prefix tokens where both sides have them; the rest
            goes to the patch tokens.
        layer_weights: weight of each paired layer, oldest first; null means equal. They are scaled to sum to 1.
        weight: factor of this alignment in the total loss.
        domains: names of the data's domains whose images this alignment is for; null means all. Domains can so have a
            teacher each, for example the student's own initialisation where it is to stay what it is. An image counts
            as much as it would in an alignment for all.
        chunk_tokens: tokens whose projection is held at a time, where the loss is the negative cosine and the head ends
            with a linear layer; 0 holds the projections of the whole batch until the backward pass.
    """

    student: str
    teacher: str
    num_layers: int = 4
    head: HeadKind = "layer_norm_linear"
    loss: Loss | None = None
    standardise: StandardiseMode = "none"
    whitening: float = 0.0
    prefix_weight: float = 0.1
    layer_weights: list[float] | None = None
    weight: float = 1.0
    domains: list[str] | None = None
    chunk_tokens: int = 4096


class Alignment(nn.Module):
    """Computes the loss between one student's and one teacher's last K hidden states.

    Args:
        config: see `AlignmentConfig`.
        student: the student.
        teacher: the teacher; not kept.

    Raises:
        ConfigError: K exceeds a depth, or weights, head and loss do not fit together.
    """

    def __init__(self, config: AlignmentConfig, student: Encoder, teacher: Encoder) -> None:
        super().__init__()
        self.config = config
        self.loss = config.loss or NegativeCosine()
        check_alignment(config, student, teacher, self.loss)
        depth = config.num_layers
        student_dims, self.teacher_dims = student.layer_dims[-depth:], teacher.layer_dims[-depth:]
        standardisers = [
            Standardiser(config.standardise, target, own, config.whitening)
            for own, target in zip(student_dims, self.teacher_dims, strict=True)
        ]
        self.target_dims = [module.out_dim for module in standardisers]
        pairs = zip(student_dims, self.target_dims, strict=True)
        self.heads = nn.ModuleList(build_head(config.head, own, target) for own, target in pairs)
        self.standardisers = nn.ModuleList(standardisers)
        weights = config.layer_weights or [1.0] * depth
        self.layer_weights = [weight / sum(weights) for weight in weights]
        self.layer_names = [f"layer_{position - depth}" for position in range(depth)]
        self._domain_ids: list[int] | None = None

    def use_domains(self, names: Sequence[str]) -> None:
        """Take the order in which batches number their domains.

        Args:
            names: of the data's domains.

        Raises:
            ConfigError: the data have no domain that this alignment names.
        """
        wanted = self.config.domains
        unknown = sorted(set(wanted or ()) - set(names))
        if unknown or wanted == []:
            raise ConfigError(
                f"{where(self.config)}: domains names {', '.join(unknown) or 'none'}; the data have {', '.join(names)}."
            )
        self._domain_ids = None if wanted is None else [list(names).index(name) for name in wanted]

    def counts(self, domain: Tensor) -> Tensor:
        """Return which images of a batch this alignment is for, bool `[B]`, from their domain ids `[B]`."""
        if self._domain_ids is None:
            return torch.ones_like(domain, dtype=torch.bool)
        return torch.isin(domain, torch.tensor(self._domain_ids, device=domain.device))

    @property
    def has_comparable_tokens(self) -> bool:
        """Whether student tokens, after the head, have the targets' width, so that a cosine can be reported."""
        return self.loss.needs_head

    @property
    def needs_calibration(self) -> bool:
        """Whether a standardiser still lacks statistics."""
        return any(cast(Standardiser, module).needs_calibration for module in self.standardisers)

    @property
    def reads_student(self) -> bool:
        """Whether the standardisers' statistics are of the untrained student's tokens too."""
        return any(cast(Standardiser, module).reads_student for module in self.standardisers)

    def new_statistics(self) -> list[FeatureStatistics]:
        """Return empty statistics, one a layer, oldest first, for `observe` and `calibrate`.

        They are of teacher tokens `[N, D]`, or, where `reads_student` is set, of these beside the student's,
        `[N, D + S]`.
        """
        own = self.target_dims if self.reads_student else [0] * len(self.teacher_dims)
        return [FeatureStatistics(target + more) for target, more in zip(self.teacher_dims, own, strict=True)]

    def observe(
        self, statistics: list[FeatureStatistics], student: list[Layer] | None, teacher: list[Layer], keep: Tensor
    ) -> None:
        """Add patch tokens to statistics.

        Args:
            statistics: from `new_statistics`.
            student: hidden states, oldest first, at least K; None where `reads_student` is not set.
            teacher: the same of the teacher.
            keep: bool `[B]`, the images that count.

        Raises:
            ValueError: there are fewer layers than K.
        """
        depth = self.config.num_layers
        chosen = select(teacher[-depth:], keep)
        if student is None:
            for layer, (_, patches) in zip(statistics, chosen, strict=True):
                layer.update(patches)
            return
        for layer, (ours, theirs) in zip(
            statistics, pair_last_layers(select(student, keep), chosen, depth), strict=True
        ):
            own, target = match_grids(ours[1], theirs[1])
            layer.update(torch.cat([target.float(), own.float()], dim=-1))

    def calibrate(self, statistics: list[FeatureStatistics]) -> None:
        """Fix the standardisers from one `FeatureStatistics` a layer, oldest first."""
        for module, layer in zip(self.standardisers, statistics, strict=True):
            cast(Standardiser, module).calibrate(layer)

    def tokens(self, student: list[Layer], teacher: list[Layer]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each paired layer, patch tokens after the head and target tokens, both `[B, N, D]`."""
        paired: list[tuple[Tensor, Tensor]] = []
        for position, (ours, theirs) in enumerate(pair_last_layers(student, teacher, self.config.num_layers)):
            own, target = match_grids(ours[1], theirs[1])
            paired.append(self._project(position, patch_tokens(own), patch_tokens(target)))
        return paired

    def forward(self, student: list[Layer], teacher: list[Layer], domain: Tensor | None = None) -> dict[str, Tensor]:
        """Return `{"loss": scalar, "loss/layer_-K": scalar, ..., "loss/layer_-1": scalar}`, float32.

        Args:
            student: hidden states, oldest first, at least K.
            teacher: hidden states, oldest first, at least K.
            domain: domain ids `[B]`; needed where the alignment is for some domains, whose part of the batch the
                values are then multiplied by.
        """
        if self._domain_ids is None or domain is None:
            return self._values(student, teacher)
        keep = self.counts(domain)
        if not bool(keep.any()):
            # Every trained parameter takes part in each step: processes that train together count on it.
            tensors = [*self.parameters(), *(part for layer in student[-self.config.num_layers :] for part in layer)]
            zero = torch.stack([0.0 * tensor.float().sum() for tensor in tensors]).sum()
            return {"loss": zero, **{f"loss/{name}": zero for name in self.layer_names}}
        share = keep.float().mean()
        kept = self._values(select(student, keep), select(teacher, keep))
        return {name: share * value for name, value in kept.items()}

    def _values(self, student: list[Layer], teacher: list[Layer]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for position, (ours, theirs) in enumerate(pair_last_layers(student, teacher, self.config.num_layers)):
            own, target = match_grids(ours[1], theirs[1])
            value = self._loss(position, patch_tokens(own), patch_tokens(target))
            prefix = shared_prefix(ours[0], theirs[0]) if self.config.prefix_weight > 0 else None
            if prefix is not None:
                prefix_loss = self._loss(position, *prefix)
                value = (1 - self.config.prefix_weight) * value + self.config.prefix_weight * prefix_loss
            values[f"loss/{self.layer_names[position]}"] = value
        weighted = [weight * value for weight, value in zip(self.layer_weights, values.values(), strict=True)]
        return {"loss": torch.stack(weighted).sum(), **values}

    def _loss(self, position: int, student: Tensor, teacher: Tensor) -> Tensor:
        head, standardiser, chunk = self.heads[position], self.standardisers[position], self.config.chunk_tokens
        if chunk and type(self.loss) is NegativeCosine and isinstance(head, nn.Sequential):
            *before, projection = head
            for module in before:
                student = module(student)
            return -projected_cosine(student, cast(nn.Linear, projection), teacher, standardiser, chunk)
        return self.loss.compute(*self._project(position, student, teacher))

    def _project(self, position: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.standardisers[position](teacher)
        return self.heads[position](student), target

    def extra_repr(self) -> str:
        """Say who is aligned with whom."""
        return f"{self.config.student} <- {self.config.teacher}, {type(self.loss).__name__}"


def where(config: AlignmentConfig) -> str:
    """Return how messages name an alignment."""
    return f"model.alignments ({config.student} <- {config.teacher})"


def select(layers: list[Layer], keep: Tensor) -> list[Layer]:
    """Return the hidden states of the images that `keep`, bool `[B]`, says."""
    return [(prefix[keep], patches[keep]) for prefix, patches in layers]


def check_alignment(config: AlignmentConfig, student: Encoder, teacher: Encoder, loss: Loss) -> None:
    """Refuse what cannot work, before any weight is loaded.

    Raises:
        ConfigError: naming the key of `model.alignments` and the way out.
    """
    name = where(config)
    shallower = min(student.depth, teacher.depth)
    if not 1 <= config.num_layers <= shallower:
        raise ConfigError(f"{name}: num_layers {config.num_layers} must be from 1 to {shallower}, the smaller depth.")
    if not 0 <= config.prefix_weight <= 1:
        raise ConfigError(f"{name}: prefix_weight {config.prefix_weight} must be from 0 to 1.")
    if config.chunk_tokens < 0:
        raise ConfigError(f"{name}: chunk_tokens {config.chunk_tokens} must be 0, for all at once, or more.")
    weights = config.layer_weights
    if weights is not None and (len(weights) != config.num_layers or min(weights) < 0 or sum(weights) <= 0):
        raise ConfigError(
            f"{name}: layer_weights {weights} must be {config.num_layers} numbers, none negative and not all zero."
        )
    student_dims, teacher_dims = student.layer_dims[-config.num_layers :], teacher.layer_dims[-config.num_layers :]
    widths_differ = config.standardise != "procrustes" and student_dims != teacher_dims
    if config.head == "none" and loss.needs_head and widths_differ:
        raise ConfigError(
            f"{name}: head none needs equal widths, but the student has {student_dims} and the teacher "
            f"{teacher_dims}; use head layer_norm_linear, standardise procrustes, or the loss distill.losses.TokenGram."
        )
    if not 0 <= config.whitening <= 1:
        raise ConfigError(f"{name}: whitening {config.whitening} must be from 0 to 1.")
    if config.whitening and config.standardise not in ROTATING:
        raise ConfigError(f"{name}: whitening is for standardise {' and '.join(ROTATING)}, not {config.standardise}.")
    if config.head != "none" and config.standardise == "procrustes":
        raise ConfigError(f"{name}: standardise procrustes gives targets of the student's width; use head none.")
    if config.head != "none" and not loss.needs_head:
        raise ConfigError(f"{name}: the loss {type(loss).__name__} compares tokens without a head; use head none.")


def describe(config: AlignmentConfig) -> dict[str, Any]:
    """Return the alignment's settings as plain values, for reports and cards."""
    return {
        "student": config.student,
        "teacher": config.teacher,
        "num_layers": config.num_layers,
        "head": config.head,
        "loss": type(config.loss or NegativeCosine()).__name__,
        "standardise": config.standardise,
        "whitening": config.whitening,
        "prefix_weight": config.prefix_weight,
        "domains": config.domains or "all",
    }
