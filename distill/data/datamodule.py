"""Shards as Lightning wants them: loaders for this rank, and the position in the plan as checkpoint state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.fetch import Batch, PlannedDataset, RowDataset
from distill.data.index import DatasetIndex, build_index
from distill.data.ledger import Ledger
from distill.data.loader import StartMethod, build_loader
from distill.data.plan import SamplePlan
from distill.data.position import PlanPosition
from distill.data.samplers import EvenSampler, PlanSampler
from distill.data.transforms import NO_AUGMENTATION, Augmentation
from distill.errors import ConfigError

Shards = str | dict[str, str | list[str]]


class ShardDataModule(LightningDataModule):
    """Training batches by plan and validation batches in order, from WebDataset shards.

    A training batch is `{"images": uint8 [B, 3, S, S], "label", "domain", "row", "index", "substituted": int64 [B]}`,
    where `domain` is an index into `domains` and `index` the place in the plan. A validation batch is the same without
    `substituted`, and its `index` is the row.

    The global batch is what one optimiser step sees. With `trainer.accumulate_grad_batches` = A on W devices, a device
    takes `global_batch_size / (W * A)` images at a time, and W * A may change between runs without changing any global
    batch. The state is the number of plan positions consumed by the optimiser, the same on every rank.

    Args:
        train: training shards: a directory of <domain>-<number>.tar files, a glob or a brace pattern, or a mapping from
            domain to one or several of these.
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
        index_dir: folder for the shards' index files; null means .distill-index beside the shards.
        max_bad_fraction: largest part of a domain's images that may be bad before the run stops, in [0, 1].

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
    ) -> None:
        super().__init__()
        for name, value in {"img_size_px": img_size_px, "global_batch_size": global_batch_size}.items():
            if value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be at least 1.")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers is {num_workers}; it must be 0 or more.")
        self.train, self.val, self.weights, self.index_dir = train, val, weights, index_dir
        self.img_size_px, self.global_batch_size, self.seed = img_size_px, global_batch_size, seed
        self.samples_per_epoch, self.val_batch_size_per_device = samples_per_epoch, val_batch_size_per_device
        self.num_workers = num_workers
        self.worker_start_method: StartMethod | None = worker_start_method
        self.augment = augment or Augmentation()
        self.ledger = Ledger(None, max_bad_fraction)
        self._max_bad_fraction = max_bad_fraction
        self._train_index: DatasetIndex | None = None
        self._val_index: DatasetIndex | None = None
        self._plan: SamplePlan | None = None
        self._consumed_at_start = 0
        self._step_at_start = 0

    @property
    def train_index(self) -> DatasetIndex:
        """The training samples.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._train_index is None:
            raise RuntimeError("ShardDataModule.setup() has not run; call it, or use the module with a Trainer.")
        return self._train_index

    @property
    def plan(self) -> SamplePlan:
        """Which training sample stands where.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self._plan is None:
            raise RuntimeError("ShardDataModule.setup() has not run; call it, or use the module with a Trainer.")
        return self._plan

    @property
    def domains(self) -> tuple[str, ...]:
        """Names that domain ids stand for: those of the training data, then those that only validation has."""
        return self.train_index.domains

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training data, hex."""
        return self.train_index.fingerprint

    @property
    def has_fixed_views(self) -> bool:
        """Whether a training image looks the same each time it is seen."""
        return self.augment == NO_AUGMENTATION

    @property
    def consumed(self) -> int:
        """Plan positions that the optimiser has gone through, over all ranks: what decides where training goes on.

        Counted in what the model has finished, not in batches fetched: a loader may be ahead of the model.
        """
        if self.trainer is None:
            return self._consumed_at_start
        steps = self.trainer.global_step - self._step_at_start
        within_step = self._epoch_batches % self._accumulated * (self.global_batch_size // self._accumulated)
        return self._consumed_at_start + steps * self.global_batch_size + within_step

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
            plan = SamplePlan(train, self.weights, self.seed)
            domains = tuple(dict.fromkeys([*train.domains, *(val.domains if val else ())]))
            self._train_index, self._val_index = train.with_domains(domains), val and val.with_domains(domains)
            self._plan = plan
        if stage == "fit" and self.trainer is not None:
            self._check_trainer(self.trainer)
            path = Path(self.trainer.default_root_dir) / "ledger" / f"rank-{self._rank:05d}.jsonl"
            self.ledger = Ledger(path, self._max_bad_fraction)

    def _build_indexes(self) -> tuple[DatasetIndex, DatasetIndex | None]:
        train = build_index(self.train, index_dir=self.index_dir, key="data.train")
        return train, build_index(self.val, index_dir=self.index_dir, key="data.val") if self.val else None

    def _check_trainer(self, trainer: Trainer) -> None:
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in cast(Any, trainer).callbacks):
            raise ConfigError(
                "The callback GradientAccumulationScheduler changes the batches a step between epochs, which an exact "
                "plan cannot follow; remove it and set trainer.accumulate_grad_batches."
            )
        # No public attribute tells; without this check Lightning would put its own sampler in place of the plan's.
        connector = getattr(trainer, "_accelerator_connector", None)
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ConfigError("trainer.use_distributed_sampler is true; set it to false: the plan shares out the data.")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's training batches, from the position where training stands.

        Raises:
            ConfigError: the global batch cannot be shared by the devices, or an epoch is shorter than one batch.
        """
        sampler = PlanSampler(*self._sampler_arguments(), start=lambda: self.consumed, **self._place())
        return self._train_loader(sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this rank's part of the validation images: each image once over all ranks, in order."""
        if self._val_index is None:
            return []
        sampler = EvenSampler(len(self._val_index), self.val_batch_size_per_device, **self._place())
        return self._loader(RowDataset(self._val_index, self.img_size_px), sampler)

    def calibration_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's part of the first global batches of the plan, leaving position and ledger as they are.

        Args:
            count: how many; they may exceed an epoch.

        Yields:
            Training batches, on the CPU.
        """
        size = self._sampler_arguments()[1]
        loader = self._train_loader(PlanSampler(max(1, count) * size, size, **self._place()))
        for batch in loader:
            batch.pop("bad")
            yield batch

    @property
    def _epoch_batches(self) -> int:
        """Batches of the present epoch that this rank's model has gone through."""
        if self.trainer is None:
            return 0
        return int(cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress.current.processed)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    @property
    def _accumulated(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    def _place(self) -> dict[str, int]:
        # Taken here, in the training process: a worker process cannot be relied on to know its rank.
        return {"rank": self._rank, "world_size": 1 if self.trainer is None else int(self.trainer.world_size)}

    def _sampler_arguments(self) -> tuple[int, int]:
        """Return the samples an epoch and the images a batch over all ranks, of which A make a global batch."""
        total, accumulated, world_size = self.global_batch_size, self._accumulated, self._place()["world_size"]
        if total % (accumulated * world_size):
            raise ConfigError(
                f"data.global_batch_size {total} is no multiple of {world_size} device(s) x "
                f"{accumulated} accumulated batch(es) (trainer.accumulate_grad_batches) = {accumulated * world_size}."
            )
        if self.samples_per_epoch is not None and self.samples_per_epoch < total:
            raise ConfigError(
                f"data.samples_per_epoch {self.samples_per_epoch} is below data.global_batch_size {total}; raise it."
            )
        # A set smaller than a batch is repeated within it.
        samples = max(total, self.samples_per_epoch or len(self.train_index))
        return samples // total * total, total // accumulated

    def _train_loader(self, sampler: Sampler[list[int]]) -> DataLoader[Batch]:
        dataset = PlannedDataset(self.plan, self.img_size_px, self.augment)
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Dataset[Batch], sampler: Sampler[list[int]]) -> DataLoader[Batch]:
        return build_loader(dataset, sampler, num_workers=self.num_workers, start_method=self.worker_start_method)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Enter a training batch in the ledger, and hand on its tensors.

        Raises:
            DataError: too large a part of a domain is bad.
        """
        if isinstance(batch, dict) and "bad" in batch:
            tensors = cast(Batch, batch)
            bad = tensors.pop("bad")
            self.ledger.record([self.domains[number] for number in tensors["domain"].tolist()], bad)
            return tensors
        return batch

    def teardown(self, stage: str) -> None:
        """Print what became of the planned samples, once training is over."""
        if stage == "fit" and self.ledger.counts():
            rank_zero_info(f"Data of rank 0: {self.ledger.summary()}")

    def position(self) -> PlanPosition:
        """Return where training stands in the plan."""
        trainer = self.trainer
        return PlanPosition(
            consumed=self.consumed,
            within_step=self._epoch_batches % self._accumulated * (self.global_batch_size // self._accumulated),
            global_step=0 if trainer is None else int(trainer.global_step),
            fingerprint=self.fingerprint,
            seed=self.seed,
            weights=dict(self.plan.weights),
            global_batch_size=self.global_batch_size,
            accumulated=self._accumulated,
            epoch_batches=self._epoch_batches,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the plan, as plain values that are the same on every rank."""
        return self.position().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position. The global batch size may differ from the saved one; the plan may not.

        Raises:
            DataError: data, seed or weights are not those of the checkpoint, saying which.
        """
        saved = PlanPosition.from_state_dict(state_dict)
        self.position().check_continues(saved)
        if saved.within_step:
            rank_zero_warn(
                f"The checkpoint was saved within an optimiser step, whose first {saved.within_step} images are not "
                "gone through again. Save at step ends: make trainer.val_check_interval a multiple of "
                "trainer.accumulate_grad_batches."
            )
        self._consumed_at_start = saved.consumed - saved.within_step
        self._step_at_start = saved.global_step
