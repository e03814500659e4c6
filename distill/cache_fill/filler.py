"""What one process needs to fill units of a cache: the recipe, its data, and its teachers with weights."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill import __version__
from distill.cache.compression import Compression, fit_basis
from distill.cache.errors_measured import measure_errors
from distill.cache.folder import CacheFolder, CacheManifest, pack_bases
from distill.cache.key import Fields, refuse_differences, teacher_fields, weights_field
from distill.cache.memory import States
from distill.cache.record import LayerName, encode_records, lay_out
from distill.cache.stored import recipe_fields
from distill.cache.units import UnitFacts, UnitPlan, Verify, fault_of, read_facts, write_unit
from distill.cache.views import ShardViews
from distill.data.index import DatasetIndex
from distill.data.transforms import NO_AUGMENTATION, Augmentation
from distill.engine import Choices, ImagesSeen, take_kernels
from distill.errors import ConfigError, DataError
from distill.finite import finite_samples
from distill.planner.recipe import Recipe, read_recipe
from distill.standardise import FeatureStatistics
from distill.weights_fingerprint import weights_fingerprint

SPLITS = ("train", "val")
AT_A_TIME = "images a teacher sees at a time"
Tick = Callable[[int], None]


@dataclass(frozen=True)
class FillJob:
    """What is to be filled, in plain values that travel to any process.

    Attributes:
        config: the recipe.
        overrides: flags that win over it.
        out: the cache's folder.
        compression: how states are stored.
        dims: channels that "pca" keeps.
        views: of each training image.
        batch_size: images a forward pass, unless the recipe sets `model.teacher_micro_batch`, or the cache was begun
            with another number.
        fit_images: images on which the basis of "pca" is fitted; the errors are measured on as many others.
        num_workers: processes that read and decode.
        device: where the teachers run.
        threads: of torch on the CPU; 0 leaves it alone.
        verify: how finished units are checked.
    """

    config: str
    overrides: tuple[str, ...]
    out: str
    compression: Compression
    dims: int
    views: int
    batch_size: int
    fit_images: int
    num_workers: int
    device: str
    threads: int
    verify: Verify


class Filler:
    """Fills units of one job.

    Args:
        job: what is to be filled.

    Raises:
        ConfigError: recipe and flags do not go together.
        DataError: a shard cannot be used.
    """

    def __init__(self, job: FillJob) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self.job, self.folder = job, CacheFolder(job.out)
        self.recipe: Recipe = read_recipe(Path(job.config), list(job.overrides))
        self.data = cast(Any, self.recipe.data)
        self.data.setup("validate")
        self.teachers, self.layers = self.recipe.task.teachers, self.recipe.task.layers_of("teacher")
        self.device = torch.device(job.device)
        if job.views > 1 and self.data.augment == NO_AUGMENTATION:
            raise ConfigError(
                f"--views is {job.views}, but data.augment changes no image: all its views are the same. Set --views 1 "
                "or an augmentation."
            )
        self._is_loaded = False
        self._units: dict[str, list[UnitPlan]] = {}
        self._manifest: CacheManifest | None = None

    def index_of(self, split: str) -> DatasetIndex | None:
        """Return the images of "train" or "val"; None where the recipe has none."""
        return cast(DatasetIndex | None, self.data.train_index if split == "train" else self.data.val_index)

    def key(self) -> Fields:
        """Return what the states depend on, with the teachers' weights read.

        Raises:
            WeightsError: a teacher's weights are missing or damaged.
        """
        modules = {name: self.teachers[name] for name in self.teachers.names()}
        fields = recipe_fields(self.data) | teacher_fields(modules)
        if not self._is_loaded:
            self.teachers.load_weights()
            self.fingerprints = {weights_field(name): weights_fingerprint(module) for name, module in modules.items()}
            self.teachers.to(self.device)
            self._is_loaded = True
        layers = {f"num_layers of {name}": str(count) for name, count in self.layers.items()}
        return fields | self.fingerprints | layers

    def manifest(self) -> CacheManifest:
        """Return the cache's manifest, making it where there is none: the basis is fitted and errors are measured.

        Raises:
            ConfigError: the folder holds states of something else: naming each field that differs.
            DataError: no image of the sample can be used, or the folder cannot be written.
            WeightsError: a teacher's weights are missing or damaged.
        """
        if self._manifest is None:
            key = self.key()
            found = self.folder.read() if self.folder.manifest_path.exists() else self._measure(key)
            settings = {"--compression": self.job.compression, "--views": str(self.job.views)}
            there = {"--compression": found.layout.compression, "--views": str(found.views)}
            if self.job.compression == "pca":
                settings["--dims"], there["--dims"] = str(self.job.dims), str(found.dims)
            advice = "Choose another --out, or set recipe and flags back."
            refuse_differences(found.key | there, key | settings, self.folder.path, advice)
            self._run_as(found)
            self._manifest, self._bases = found, self.folder.read_bases(found)
            self._bases = {name: basis.to(self.device) for name, basis in self._bases.items()}
        return self._manifest

    def _measure(self, key: Fields) -> CacheManifest:
        """Choose kernels, fit the bases on some images, measure errors on others, and begin the cache."""
        job, own = self.job, self.recipe.task.engine
        own.choose_for_teachers(self.teachers, ImagesSeen(self.data.img_size_px, job.batch_size, None, self.device))
        engine: Choices = {**own.choices, AT_A_TIME: self.teachers.micro_batch or job.batch_size}
        fitted, held_out = self._sample_states()
        bases = {}
        if job.compression == "pca":
            for name, count in self.layers.items():
                for layer in range(-count, 0):
                    bases[name, layer] = self._fit(fitted, (name, layer))
        packed = pack_bases(bases)
        layout = lay_out(fitted[0], job.compression, job.dims)
        errors = measure_errors(held_out, job.compression, job.dims, bases)
        made = {"device": job.device, "torch": torch.__version__, "python": platform.python_version()}
        made["distill"] = __version__
        checksum = hashlib.sha256(packed).hexdigest() if packed else ""
        manifest = CacheManifest(key, layout, job.views, job.dims, checksum, errors, made, engine)
        return self.folder.create(manifest, packed)

    def _run_as(self, manifest: CacheManifest) -> None:
        """Have the teachers run as in the process that began the cache; a number in the recipe wins."""
        take_kernels(manifest.engine, self.teachers, self.device)
        number = self.recipe.task.engine.micro_batch or manifest.engine.get(AT_A_TIME, self.job.batch_size)
        self.teachers.micro_batch = int(number)
        # Whole forward passes: a last one that is filled up costs as much as a full one.
        self._batch_size = -(-self.job.batch_size // int(number)) * int(number)

    def _fit(self, states: list[States], name: LayerName) -> Any:
        teacher, layer = name
        statistics = FeatureStatistics(states[0][teacher][layer][1].shape[-1])
        for batch in states:
            for part in batch[teacher][layer]:
                tokens = part.flatten(0, -2)
                statistics.update(tokens[tokens.isfinite().all(-1)])
        try:
            return fit_basis(statistics, self.job.dims)
        except ValueError as error:
            raise DataError(f"The basis of {teacher!r}, layer {layer}, cannot be fitted. {error}") from error

    def _sample_states(self) -> tuple[list[States], list[States]]:
        """Return two sets of batches of hidden states, on the CPU, of images spread evenly over the training data."""
        index = self.index_of("train")
        assert index is not None, "a recipe has training data"
        rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), 2 * self.job.fit_images)).astype(int))
        items = [self._views("train", index, range(row, row + 1))[0] for row in rows.tolist()]
        images = [item["image"] for item in items if item["usable"]]
        if not images:
            raise DataError("None of the images that the compression is measured on can be used; see `distill index`.")
        return self._finite_states(images[::2]), self._finite_states(images[1::2] or images)

    def _finite_states(self, images: list[Tensor]) -> list[States]:
        found: list[States] = []
        for batch in torch.stack(images).split(self.job.batch_size):
            states = self._forward(batch)
            keep = torch.stack([finite_samples(layers) for layers in states.values()]).all(0)
            found.append(_selected(states, keep))
        return found

    def _views(self, split: str, index: DatasetIndex, rows: range) -> ShardViews:
        is_train = split == "train"
        augmentation: Augmentation = self.data.augment if is_train else NO_AUGMENTATION
        return ShardViews(
            index,
            rows,
            views=self.job.views if is_train else 1,
            img_size_px=self.data.img_size_px,
            seed=self.data.seed,
            augmentation=augmentation,
            scaled_decoding=self.data.scaled_decoding,
        )

    def _forward(self, images: Tensor) -> States:
        size = self.job.batch_size
        return self.teachers.forward_hidden_states(images.to(self.device), self.layers, batch_size=size)

    def units(self, split: str) -> list[UnitPlan]:
        """Return a split's units, one a shard; none where the recipe has no such split."""
        index = self.index_of(split)
        if split not in self._units:
            self._units[split] = [] if index is None else self.folder.units(self.manifest(), split, index)
        return self._units[split]

    def fill(self, split: str, number: int, tick: Tick = lambda _: None) -> tuple[UnitFacts, str | None]:
        """Make one unit unless it is finished and passes its check; the one function that every engine calls.

        Args:
            split: "train" or "val".
            number: of the shard.
            tick: called with the number of views that are done since its last call.

        Returns:
            The unit's facts, and why it was made; None if it was kept.

        Raises:
            DataError: the shard cannot be read or the unit cannot be written.
        """
        index, plan = self.index_of(split), self.units(split)[number]
        assert index is not None, "units are of images"
        fault = fault_of(plan, self.job.verify)
        facts = read_facts(plan)
        if fault is None and facts is not None:
            tick(plan.rows * plan.views)
            return facts, None
        first = index.shards[number].first_row
        views = self._views(split, index, range(first, first + plan.rows))
        return write_unit(plan, self._records(views, tick)), fault

    def _records(self, views: ShardViews, tick: Tick) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield encoded batches; the one before is being written while the teachers work on the next."""
        loader = DataLoader(views, self._batch_size, num_workers=self.job.num_workers, collate_fn=_collate)
        layout = self.manifest().layout
        with ThreadPoolExecutor(1) as pool:
            pending: Future[tuple[Tensor, Tensor]] | None = None
            for images, usable in loader:
                records = encode_records(self._forward(images), layout, self._bases)
                following = pool.submit(_finished, records, usable)
                if pending is not None:
                    yield pending.result()
                pending = following
                tick(len(usable))
            if pending is not None:
                yield pending.result()


def _finished(records: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    records = records.cpu()
    records[~usable] = 0
    return records, usable


def _collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    # Channels last, as training's batches are: kernels round by layout.
    images = torch.stack([item["image"].permute(1, 2, 0) for item in items]).permute(0, 3, 1, 2)
    return images, torch.tensor([item["usable"] for item in items])


def _selected(states: States, keep: Tensor) -> States:
    return {
        name: [(prefix[keep].cpu(), patches[keep].cpu()) for prefix, patches in layers]
        for name, layers in states.items()
    }
