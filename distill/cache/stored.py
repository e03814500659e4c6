"""Teacher states of a cache in place of the teachers: opened and checked for a recipe, handed out by batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache.compression import Basis
from distill.cache.folder import CacheFolder, CacheManifest
from distill.cache.key import Fields, data_fields, refuse_differences, teacher_fields, weights_field
from distill.cache.memory import States
from distill.cache.reader import RecordReader
from distill.cache.record import LayerName, decode_records
from distill.cache.units import UnitPlan, fault_of
from distill.cache.views import StoredPlannedDataset, StoredRowDataset
from distill.checkpoint import read_weights
from distill.data.index import DatasetIndex
from distill.data.plan import SamplePlan
from distill.data.transforms import Augmentation
from distill.errors import ConfigError, DataError, WeightsError
from distill.weights_fingerprint import weights_fingerprint

ADVICE = (
    "Set the recipe back to what the cache was filled with, fill another folder with `distill cache`, or set "
    "model.teacher_states to null."
)


class StoredStates:
    """A cache that fits a recipe.

    It is the data module's source of datasets that bring records along, and the task's source of hidden states.

    Args:
        folder: the cache.
        manifest: its manifest.
        layers: how many last hidden states of which teacher the recipe needs.
    """

    def __init__(self, folder: CacheFolder, manifest: CacheManifest, layers: Mapping[str, int]) -> None:
        self.folder, self.manifest, self.layers = folder, manifest, dict(layers)
        self._bases = folder.read_bases(manifest)
        self._bases_of: dict[torch.device, dict[LayerName, Basis]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> StoredStates:
        return self

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each teacher's weights, as they were when the cache was filled."""
        return {name: self.manifest.key[weights_field(name)] for name in self.layers}

    def states(self, records: Tensor) -> States:
        """Return the hidden states of a batch's records, on their device.

        Args:
            records: uint8 `[B, R]`.
        """
        return decode_records(records, self.manifest.layout, self._bases_on(records.device), self.layers)

    def _bases_on(self, device: torch.device) -> dict[LayerName, Basis]:
        if device not in self._bases_of:
            self._bases_of[device] = {name: basis.to(device) for name, basis in self._bases.items()}
        return self._bases_of[device]

    def training(
        self,
        plan: SamplePlan,
        img_size_px: int,
        augmentation: Augmentation,
        *,
        epoch_samples: int,
        scaled_decoding: bool,
    ) -> Dataset[dict[str, Any]]:
        """Return a plan's samples with their records; the arguments are those of `StoredPlannedDataset`.

        Raises:
            DataError: a unit is missing or has another size.
        """
        reader = self.reader("train", plan.index)
        settings: dict[str, Any] = {"epoch_samples": epoch_samples, "scaled_decoding": scaled_decoding}
        return StoredPlannedDataset(plan, img_size_px, augmentation, reader=reader, **settings)

    def validation(self, index: DatasetIndex, img_size_px: int, min_decoded_px: int | None) -> Dataset[dict[str, Any]]:
        """Return an index's samples in order with their records.

        Raises:
            DataError: a unit is missing or has another size.
        """
        return StoredRowDataset(index, img_size_px, min_decoded_px, self.reader("val", index))

    def reader(self, split: str, index: DatasetIndex) -> RecordReader:
        """Return a reader of a split's records.

        Raises:
            DataError: a unit is missing or has another size.
        """
        units = self.folder.units(self.manifest, split, index)
        check_complete(self.folder.path, units)
        return RecordReader(index, units)


def check_complete(folder: Path, units: list[UnitPlan]) -> None:
    """Refuse a cache of which a unit is missing or has another size.

    Raises:
        DataError: naming the first such unit and how many there are.
    """
    faults = [(unit, fault) for unit in units if (fault := fault_of(unit, "size"))]
    if faults:
        unit, fault = faults[0]
        raise DataError(
            f"{len(faults)} of {len(units)} units in {folder} cannot be used; {unit.path.name} {fault}. Run the same "
            "`distill cache` command again: it keeps what is finished."
        )


def open_states(
    path: Path | str, teachers: Mapping[str, nn.Module], layers: Mapping[str, int], data: Any, *, checks_weights: bool
) -> StoredStates:
    """Open a cache for a recipe.

    Args:
        path: the cache.
        teachers: the recipe's, which need no weights.
        layers: how many last hidden states of each are needed.
        data: the recipe's `ShardDataModule`, after its setup.
        checks_weights: whether to compare the weights that the recipe names with those that filled the cache, where
            their files are present: they are read once, on the CPU, and let go.

    Raises:
        ConfigError: there is no cache, or it is of something else: naming each field that differs.
        DataError: the cache is damaged.
        WeightsError: weights are present and cannot be read.
    """
    folder = CacheFolder(path)
    manifest = folder.read()
    wanted = recipe_fields(data) | teacher_fields(teachers)
    if checks_weights:
        wanted |= present_weights(teachers)
    refuse_differences(manifest.key, wanted, folder.path, ADVICE)
    for name, count in layers.items():
        stored = manifest.layout.layers_of(name)
        if count > stored:
            raise ConfigError(
                f"The teacher states in {folder.path} are of something else:\n  - num_layers of {name}: {stored} "
                f"there, {count} here\n{ADVICE}"
            )
    return StoredStates(folder, manifest, layers)


def recipe_fields(data: Any) -> Fields:
    """Return the key's part of a `ShardDataModule` after its setup."""
    return data_fields(
        data.train_index,
        data.val_index,
        img_size_px=data.img_size_px,
        scaled_decoding=data.scaled_decoding,
        augmentation=data.augment,
        seed=data.seed,
    )


def present_weights(teachers: Mapping[str, nn.Module]) -> Fields:
    """Return the fingerprints of those teachers whose weights are here.

    Raises:
        WeightsError: weights are here and cannot be read.
    """
    fields: Fields = {}
    for name, teacher in teachers.items():
        loaded = copy.deepcopy(teacher)  # without weights it costs nothing, and goes away with them
        try:
            read_weights(loaded, f"teacher {name!r}")
        except WeightsError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        fields[weights_field(name)] = weights_fingerprint(loaded)
    return fields
