"""The LightningModule: teachers, students and their alignments for one step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill.alignment import Alignment, AlignmentConfig
from distill.cache.memory import HiddenStateMemory
from distill.cache.stored import StoredStates, open_states
from distill.cache.views import STATES_KEY
from distill.checkpoint import read_weights
from distill.encoder import Encoder, Layer
from distill.engine import Engine, EngineConfig, MicroBatch
from distill.errors import ConfigError
from distill.finite import finite_samples
from distill.frozen_teachers import FrozenTeachers
from distill.gradient_clipping import FusedClipping
from distill.initial_values import kept_initial_values
from distill.low_resolution import LowResolution
from distill.metrics import DomainCosine
from distill.optim import OptimConfig, build_optimizer, build_scheduler, parameter_groups
from distill.roster import as_modules, check_names, layers_needed, refuse_other_weights, refuse_uncalibrated
from distill.target_calibration import calibrate_alignments
from distill.validation_values import validation_values
from distill.weights_fingerprint import weights_fingerprint

Batch = dict[str, Any]


class DistillationTask(FusedClipping):
    """Aligns every student with its teachers on the last K hidden states.

    The teachers' forward is computed once a batch and shared by all students.

    Args:
        teachers: frozen encoders by name, each by class_path.
        students: trained encoders by name, each by class_path.
        alignments: who learns from whom and how; null means every student from every teacher with the defaults.
        optimizer: learning rates, weight decay and schedule.
        teacher_micro_batch: images a teacher sees at a time; null means the whole batch, "auto" what is measured to be
            fastest on a CPU, and the whole batch on other devices.
        teacher_cache_gib: memory, in GiB a process, for the teachers' hidden states of images already seen; 0 keeps
            none. Needs fixed views: data.augment.reencode none and no crops or flips.
        teacher_states: folder that `distill cache` filled for this recipe: the teachers' hidden states are read from
            it and the teachers are not run. Their weights need not be here; where they are, the main process compares
            them with those that filled it. null runs the teachers.
        calibration_batches: training batches from which the statistics of standardised targets are taken before the
            first step; used only where an alignment standardises.
        low_resolution: lets students begin on small copies of the images; null shows them whole ones from the start.
        engine: how steps are run: attention kernels, torch.compile, teachers spread over the ranks.

    Raises:
        ConfigError: a name is unknown, a student has no alignment, or an encoder is no module.
    """

    def __init__(
        self,
        teachers: dict[str, Encoder],
        students: dict[str, Encoder],
        alignments: list[AlignmentConfig] | None = None,
        optimizer: OptimConfig | None = None,
        teacher_micro_batch: MicroBatch = None,
        teacher_cache_gib: float = 0.0,
        calibration_batches: int = 16,
        teacher_states: Path | None = None,
        low_resolution: LowResolution | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        super().__init__()
        configs = alignments or [AlignmentConfig(own, other) for own in students for other in teachers]
        teacher_modules, student_modules = as_modules("teachers", teachers), as_modules("students", students)
        check_names(configs, teachers, students)
        self.engine = Engine(engine or EngineConfig(), teacher_micro_batch, remembers_states=teacher_cache_gib > 0)
        self.teachers = FrozenTeachers(teacher_modules, self.engine.micro_batch)
        self.students = nn.ModuleDict(student_modules)
        self.alignments = nn.ModuleList(
            Alignment(config, students[config.student], teachers[config.teacher]) for config in configs
        )
        self.optimizer_config = optimizer or OptimConfig()
        self.calibration_batches, self.teacher_states = calibration_batches, teacher_states
        self.low_resolution = low_resolution
        self.low_resolution_steps = 0
        self.memory = HiddenStateMemory(int(teacher_cache_gib * 2**30))
        self.stored: StoredStates | None = None
        self.initial_metrics: dict[str, float] = {}
        self.teacher_is_finite: dict[str, Tensor] = {}
        self._non_finite_val_samples = 0
        self._has_weights = False
        self._fingerprints: dict[str, str] = {}
        self._metrics: list[MetricCollection] = []

    def configure_model(self) -> None:
        """Read all weights, once; Lightning calls this before it builds the optimiser.

        Raises:
            WeightsError: naming the teacher or student.
        """
        if self._has_weights:
            return
        if self.stored is None:
            self.engine.shard(self.teachers)
        # Lightning makes the GPU the default device here; weights are read, converted and resized on the CPU.
        with torch.device("cpu"):
            if self.stored is None:
                self.teachers.load_weights()
            for name, student in self.students.items():
                read_weights(student, f"student {name!r}")
        self._has_weights = True
        if self.teachers.is_sharded:  # fingerprints then take all ranks, as saving need not
            self.teacher_fingerprints()

    def cpu(self) -> DistillationTask:
        """Move to the CPU; without weights there is nothing to move.

        Lightning calls this when a run ends, also when it ends before the weights were read: on the meta device the
        move would fail and hide the error that ended the run.
        """
        return super().cpu() if self._has_weights else self

    def configure_optimizers(self) -> Any:
        """Return fused AdamW and its per-step schedule."""
        groups = parameter_groups(self.students, self.alignments, self.optimizer_config)
        optimizer = build_optimizer(groups, self.optimizer_config)
        total_steps = int(self.trainer.estimated_stepping_batches)
        if self.low_resolution is not None:
            self.low_resolution_steps = round(self.low_resolution.fraction * total_steps)
        scheduler = build_scheduler(optimizer, total_steps, self.optimizer_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Make one set of validation metrics for each alignment that can report a cosine.

        Raises:
            ConfigError: teacher states are to be remembered although the training views change, those in
                `teacher_states` are of something else, a student cannot take the size of `low_resolution`, or an
                alignment names a domain that the data do not have.
            DataError: the folder `teacher_states` is damaged or not filled.
        """
        data = cast(Any, self.trainer).datamodule
        if self.teacher_states is not None and self.stored is None:
            self._open_stored(self.teacher_states, data)
        if stage == "fit" and self.stored is None and self.memory.limit_bytes and not data.has_fixed_views:
            raise ConfigError(
                "model.teacher_cache_gib remembers what the teacher said about an image, but data.augment changes the "
                "image each time; set data.augment to {reencode: none}, or teacher_cache_gib to 0."
            )
        if stage == "fit" and self.low_resolution is not None:
            self.low_resolution.check(data.img_size_px, cast(dict[str, Encoder], dict(self.students.items())))
        domains = data.domains
        for module in self.alignments:
            cast(Alignment, module).use_domains(domains)
        self._metrics = [
            MetricCollection(
                {name: DomainCosine(domains, dim) for name, dim in zip(a.layer_names, a.target_dims, strict=True)},
                compute_groups=False,
            )
            for a in self.comparable_alignments()
        ]

    def _open_stored(self, folder: Path, data: Any) -> None:
        teachers = {name: self.teachers[name] for name in self.teachers.names()}
        checks_weights = bool(self.trainer.is_global_zero)
        with torch.device("cpu"):
            self.stored = open_states(folder, teachers, self.layers_of("teacher"), data, checks_weights=checks_weights)
        data.stored, self._fingerprints = self.stored, self.stored.fingerprints()

    def layers_of(self, role: Literal["teacher", "student"]) -> dict[str, int]:
        """Return how many last hidden states of each teacher or student the alignments need together."""
        return layers_needed([cast(Alignment, module).config for module in self.alignments], role)

    def comparable_alignments(self) -> list[Alignment]:
        """The alignments whose student tokens can be compared with the teacher's by a cosine."""
        alignments = [cast(Alignment, module) for module in self.alignments]
        return [alignment for alignment in alignments if alignment.has_comparable_tokens]

    def on_fit_start(self) -> None:
        """Move the teachers to the device, choose kernels, and take the statistics that standardised targets need."""
        self._prepare_encoders()
        self.calibrate()

    def on_train_start(self) -> None:
        """Write a resumed run's initial validation values again, where its folder has no log of the run before."""
        self.initial_metrics = kept_initial_values(self.trainer, self.initial_metrics)

    def on_validation_start(self) -> None:
        """Move the teachers and the metrics to the device, also when validation runs alone."""
        self._prepare_encoders()
        self.teachers.begin_uneven(cast(Any, self.trainer).datamodule)
        for collection in self._metrics:
            collection.to(self.device)

    def _prepare_encoders(self) -> None:
        if self.stored is None:
            self.teachers.to(self.device)
        self.engine.start(self.trainer, self.teachers if self.stored is None else None, self.students, self.device)

    def hidden_states(
        self, batch: Batch, split: Literal["train", "val"]
    ) -> tuple[dict[str, list[Layer]], dict[str, list[Layer]]]:
        """Return the hidden states of every teacher and of every student, as many as their alignments need."""
        images, targets = batch["images"], self._targets(batch, split)
        if self.low_resolution is not None and split == "train" and self.global_step < self.low_resolution_steps:
            images = self.low_resolution.shrink(images)
        self.teacher_is_finite = {name: finite_samples(layers) for name, layers in targets.items()}
        return targets, self._own_states(images)

    def _own_states(self, images: Tensor) -> dict[str, list[Layer]]:
        try:
            return {
                name: cast(Encoder, self.students[name]).forward_hidden_states(images, count)
                for name, count in self.layers_of("student").items()
            }
        except ValueError as error:  # how an encoder refuses images of a size it cannot take
            size = f"{images.shape[-2]} x {images.shape[-1]} px"
            raise ConfigError(
                f"The students cannot take images of {size} (data.img_size_px, model.low_resolution). {error}"
            ) from error

    def _targets(self, batch: Batch, split: Literal["train", "val"]) -> dict[str, list[Layer]]:
        if self.stored is not None:
            return self.stored.states(batch[STATES_KEY])
        images, layers = batch["images"], self.layers_of("teacher")
        forward = self.teachers.forward_hidden_states
        return self.memory.fetch(
            split, batch["row"], images, lambda part: forward(part, layers, batch_size=len(images))
        )

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the total loss and its parts for one batch, without logging."""
        targets, own = self.hidden_states(batch, "train")
        values: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        for module in self.alignments:
            alignment = cast(Alignment, module)
            config = alignment.config
            result = alignment(own[config.student], targets[config.teacher], batch.get("domain"))
            parts.append(config.weight * result.pop("loss"))
            values |= {self._named(key, alignment): value for key, value in result.items()}
        return {"loss/total": torch.stack(parts).sum(), **values}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the total loss; log it and its parts."""
        values = self._step(batch)
        self.log_dict({key: value.detach() for key, value in values.items()}, batch_size=len(batch["images"]))
        return values["loss/total"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect each layer's cosine by domain."""
        targets, own = self.hidden_states(batch, "val")
        for alignment, collection in zip(self.comparable_alignments(), self._metrics, strict=True):
            config = alignment.config
            refuse_uncalibrated(alignment)
            # One such image would make its domain's values NaN; it is left out and counted.
            keep = self.teacher_is_finite[config.teacher] & finite_samples(own[config.student])
            self._non_finite_val_samples += int((~keep).sum())
            keep &= alignment.counts(batch["domain"])
            layers = alignment.tokens(own[config.student], targets[config.teacher])
            for name, (student, teacher) in zip(alignment.layer_names, layers, strict=True):
                cast(DomainCosine, collection[name]).update(student[keep], teacher[keep], batch["domain"][keep])

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; before the first step they become the initial values."""
        self.teachers.end_uneven()
        values: dict[str, Tensor] = {}
        for alignment, collection in zip(self.comparable_alignments(), self._metrics, strict=True):
            layers = {name: cast(DomainCosine, collection[name]).compute() for name in alignment.layer_names}
            for key, value in validation_values(layers).items():
                values[self._named(key, alignment)] = value
            collection.reset()
        bad, self._non_finite_val_samples = float(self._non_finite_val_samples), 0
        if self.trainer.sanity_checking:
            self.initial_metrics = kept_initial_values(self.trainer, self.initial_metrics, values)
        else:
            self.log_dict(values)
            self.log("non_finite/val_samples", bad, reduce_fx="sum", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the initial validation values beside the weights, and what tells the teachers."""
        checkpoint["initial_metrics"] = self.initial_metrics
        checkpoint["teacher_fingerprints"] = self.teacher_fingerprints()
        checkpoint["engine_choices"] = self.engine.choices

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the initial validation values back, and refuse other teachers than the checkpoint's.

        Raises:
            WeightsError: a teacher of the same name has other weights.
        """
        self.initial_metrics = checkpoint.get("initial_metrics", {})
        self.engine.choices = dict(checkpoint.get("engine_choices", {}))
        refuse_other_weights(self.teacher_fingerprints(), checkpoint.get("teacher_fingerprints", {}))

    def teacher_fingerprints(self) -> dict[str, str]:
        """Return `weights_fingerprint` of each teacher by name, taken once."""
        if not self._fingerprints:
            self._fingerprints = {name: weights_fingerprint(self.teachers[name]) for name in self.teachers.names()}
        return self._fingerprints

    @torch.no_grad()
    def calibrate(self) -> None:
        """Take the targets' statistics over the first training batches; does nothing when none are wanted."""
        count, states = self.calibration_batches, (self._targets_of, self._untrained_states)
        calibrate_alignments(self.trainer, self.device, self.alignments, count, *states)

    def _targets_of(self, batch: Batch, layers: Mapping[str, int]) -> dict[str, list[Layer]]:
        if self.stored is not None:
            return self.stored.states(batch[STATES_KEY].to(self.device))
        return self.teachers.forward_hidden_states(batch["images"].to(self.device), layers)

    def _untrained_states(self, batch: Batch) -> dict[str, list[Layer]]:
        modes = [(module, module.training) for module in self.students.modules()]
        self.students.eval()  # batch norms keep the statistics of their weights
        states = self._own_states(batch["images"].to(self.device))
        for module, mode in modes:
            module.training = mode
        return states

    def _named(self, key: str, alignment: Alignment) -> str:
        """Put student and teacher into a metric's path where the run has several alignments."""
        if len(self.alignments) == 1:
            return key
        head, tail = key.split("/", 1)
        return f"{head}/{alignment.config.student}/{alignment.config.teacher}/{tail}"
