"""Shards as Lightning wants them: indexes, and loaders for this rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.fetch import Batch, PlannedDataset, RowDataset
from distill.data.index import DatasetIndex, build_index
from distill.data.ledger import Ledger
from distill.data.loader import StartMethod, build_loader
from distill.data.look_ahead import LookAhead
from distill.data.plan_segments import WeightChange, check_steps
from distill.data.planned_datamodule import PlannedDataModule, listing
from distill.data.samplers import EvenSampler, PlanSampler, epoch_and_batch
from distill.data.shard_cache_config import ShardCacheConfig
from distill.data.stored_views import StoredViews
from distill.data.transforms import NO_AUGMENTATION, Augmentation
from distill.errors import ConfigError

Shards = str | dict[str, str | list[str]]


class ShardDataModule(PlannedDataModule):
    """Training batches by plan and validation batches in order, from WebDataset shards.

    A training batch is `{"images": uint8 [B, 3, S, S], "label", "domain", "row", "index", "substituted": int64 [B]}`,
    where `domain` is an index into `domains` and `index` the place in the plan. A validation batch is the same without
    `substituted`, and its `index` is the row.

    The global batch is what one optimiser step sees. With `trainer.accumulate_grad_batches` = A on W devices, a device
    takes `global_batch_size / (W * A)` images at a time, and W * A may change between runs without changing any global
    batch. The state is the number of plan positions consumed, the mixes so far and the ledger's counts: the same on
    every rank.

    Args:
        train: training shards: a directory of <domain>-<number>.tar files, a glob or a brace pattern, or a mapping from
            domain to one or several of these; local, or at s3:// or gs://, or at http(s):// (exact names and brace
            patterns only).
        val: validation shards, likewise; null means no validation.
        weights: share of each domain in training, relative to each other; null means equal shares.
        img_size_px: side of the square views.
        global_batch_size: images an optimiser step, over all devices and accumulated batches.
        samples_per_epoch: images an epoch, an incomplete last batch being left out; null means as many as there are.
        val_batch_size_per_device: images a validation batch of one device.
        num_workers: processes a device that read and decode; 0 does it in the training process.
        worker_start_method: how workers start; null means Python's default. forkserver or spawn are safer beside
            threads, fork starts faster.
        augment: what happens to training images before resizing; null means JPEG re-encoding only.
        seed: of the plan and of the augmentation, from 0 to 2**32 - 1.
        index_dir: folder for the shards' index files; null means .distill-index beside local shards, and
            ~/.cache/encoder-distill/index for those behind URLs.
        max_bad_fraction: largest part of a domain's images that may be bad before the run stops, in [0, 1].
        weight_changes: other weights from given optimiser steps on, by ascending step; null keeps `weights`. Each
            domain goes on in its own sequence. A resumed run may add or alter changes of steps that were not done.
        shuffle_window: for shards in a store where reading here and there is slow. A pass then takes a domain's shards
            one after another, in random order, and shuffles this many rows together; a few shards' worth is a good
            value. null shuffles each domain whole.
        allow_new_data: go on with other training shards than the checkpoint's, from the resumed step on. Domains whose
            shards are the same go on in their pass.
        record_samples: write step, place in the plan and row of each training sample to
            ledger/samples-rank-N.csv in the run's folder.
        shard_cache: where shards from object stores are kept on each machine, up to which size, and how they are
            fetched; null means 100 GiB in ~/.cache/encoder-distill/shards. Without effect on local shards.
        scaled_decoding: decode JPEGs of more than twice the view's size at 1/2, 1/4 or 1/8 of it. Faster there, and not
            the same pixels: about 44 dB from decoding whole.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        train: Shards,
        val: Shards | None = None,
        weights: dict[str, float] | None = None,
        img_size_px: int = 448,
        global_batch_size: int = 32,
        samples_per_epoch: int | None = None,
        val_batch_size_per_device: int = 32,
        num_workers: int = 4,
        worker_start_method: StartMethod | None = None,
        augment: Augmentation | None = None,
        seed: int = 0,
        index_dir: Path | None = None,
        max_bad_fraction: float = 0.01,
        weight_changes: list[WeightChange] | None = None,
        shuffle_window: int | None = None,
        allow_new_data: bool = False,
        record_samples: bool = False,
        shard_cache: ShardCacheConfig | None = None,
        scaled_decoding: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.weight_changes = weights, weight_changes or []
        self.seed, self.shuffle_window, self.global_batch_size = seed, shuffle_window, global_batch_size
        self.allow_new_data, self.record_samples = allow_new_data, record_samples
        for name, value in {"img_size_px": img_size_px, "global_batch_size": global_batch_size}.items():
            if value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be at least 1.")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers is {num_workers}; it must be 0 or more.")
        self.train, self.val, self.index_dir, self.img_size_px = train, val, index_dir, img_size_px
        self.samples_per_epoch, self.val_batch_size_per_device = samples_per_epoch, val_batch_size_per_device
        self.num_workers = num_workers
        self.worker_start_method: StartMethod | None = worker_start_method
        self.augment = augment or Augmentation()
        check_steps(self.weight_changes)
        self.max_bad_fraction = Ledger(None, max_bad_fraction).max_bad_fraction
        self._val_index: DatasetIndex | None = None
        self.shard_cache, self.scaled_decoding = shard_cache, scaled_decoding
        self._look_ahead: LookAhead | None = None
        self.stored: StoredViews | None = None

    @property
    def val_index(self) -> DatasetIndex | None:
        """The validation samples, after `setup`; None where there are none."""
        return self._val_index

    @property
    def has_fixed_views(self) -> bool:
        """Whether a training image looks the same each time it is seen."""
        return self.augment == NO_AUGMENTATION

    def prepare_data(self) -> None:
        """Index the shards, on one process a node, so that the others find the index made."""
        self._build_indexes()

    def setup(self, stage: str) -> None:
        """Read the index of all shards and lay the plan; called on every process.

        Raises:
            ConfigError: shards or weights are not given rightly.
            DataError: a shard cannot be used.
        """
        if self._train_index is None:
            train, val = self._build_indexes()
            self._plan = self._lay_plan(train)
            domains = tuple(dict.fromkeys([*train.domains, *(val.domains if val else ())]))
            self._train_index, self._val_index = train.with_domains(domains), val and val.with_domains(domains)
        self._books = None
        if stage == "fit" and self.trainer is not None:
            self._view.check()

    def facts(self) -> dict[str, str | dict[str, str]]:
        """Return what has to be the same on every rank, by the recipe's keys."""
        validation = {"data.val": listing(self._val_index) if self._val_index else "null"}
        return {**super().facts(), **validation, "data.samples_per_epoch": str(self.samples_per_epoch)}

    def _build_indexes(self) -> tuple[DatasetIndex, DatasetIndex | None]:
        def build(shards: Shards, key: str) -> DatasetIndex:
            return build_index(shards, index_dir=self.index_dir, key=key, shard_cache=self.shard_cache)

        return build(self.train, "data.train"), build(self.val, "data.val") if self.val else None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's training batches, from the position where training stands.

        Raises:
            ConfigError: the global batch cannot be shared by the devices, or an epoch is shorter than one batch.
        """
        sampler = PlanSampler(*self._sampler_arguments(), start=lambda: self.consumed, **self._view.place)
        self._stop_look_ahead()
        if (ranks := self._view.ranks_to_look_ahead_for) is not None:
            self._look_ahead = LookAhead(self.plan, self.consumed, world_size=self._view.world_size, ranks=ranks)
        return self._train_loader(sampler)

    def _stop_look_ahead(self) -> None:
        if self._look_ahead is not None:
            self._look_ahead.stop()
            self._look_ahead = None

    def on_exception(self, exception: BaseException) -> None:
        """Fetch no more shards."""
        self._stop_look_ahead()

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this rank's part of the validation images: each image once over all ranks, in order."""
        if self._val_index is None:
            return []
        sampler = EvenSampler(len(self._val_index), self.val_batch_size_per_device, **self._view.place)
        kind = RowDataset if self.stored is None else self.stored.validation
        rows = kind(self._val_index, self.img_size_px, self.img_size_px if self.scaled_decoding else None)
        return self._loader(rows, sampler)

    def calibration_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's part of the first global batches of the plan, leaving position and ledger as they are.

        Args:
            count: how many; they may exceed an epoch.

        Yields:
            Training batches, on the CPU.
        """
        size, first = self._sampler_arguments()[1], self.plan.first_position
        loader = self._train_loader(PlanSampler(max(1, count) * size, size, start=first, **self._view.place))
        for batch in loader:
            batch.pop("bad")
            yield batch

    def _sampler_arguments(self) -> tuple[int, int]:
        """Return the samples an epoch and the images a batch over all ranks, of which A make a global batch."""
        view, samples = self._view, self.samples_per_epoch
        return epoch_and_batch(
            self.global_batch_size, len(self.train_index), samples, view.world_size, view.accumulated
        )

    def _train_loader(self, sampler: Sampler[list[int]]) -> DataLoader[Batch]:
        views, scaled = (self.plan, self.img_size_px, self.augment), self.scaled_decoding
        if self.stored is None:
            return self._loader(PlannedDataset(*views, scaled_decoding=scaled), sampler)
        samples = self._sampler_arguments()[0]
        return self._loader(self.stored.training(*views, epoch_samples=samples, scaled_decoding=scaled), sampler)

    def _loader(self, dataset: Dataset[Batch], sampler: Sampler[list[int]]) -> DataLoader[Batch]:
        return build_loader(dataset, sampler, num_workers=self.num_workers, start_method=self.worker_start_method)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Enter a training batch in the ledger, and hand on its tensors.

        Raises:
            DataError: too large a part of a domain is bad, the batch is not the one that is due, or a shard of the
                coming samples cannot be fetched.
        """
        if isinstance(batch, dict) and "bad" in batch:
            tensors, books, position = cast(Batch, batch), self._open_books(), self.position()
            bad = tensors.pop("bad")
            if self._look_ahead is not None:
                self._look_ahead.advance(position.consumed)
            books.enter(tensors, bad, consumed=position.consumed, size=self._progress.batch_size, step=position.step)
            return tensors
        return batch

    def teardown(self, stage: str) -> None:
        """Print what became of the planned samples, once training is over, and write `ledger/summary.json`.

        Raises:
            DataError: seen + quarantined is not planned.
        """
        self._stop_look_ahead()
        if stage == "fit" and self._books is not None:
            self._books.close(self.position())
