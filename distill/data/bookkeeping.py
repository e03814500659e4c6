"""The books of a run: the ledger over all ranks and resumes, its summary, and the record of samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from distill.data.ledger import Counts, Ledger, added, told
from distill.data.position import PlanPosition
from distill.errors import DataError
from distill.trainer_view import TrainerView


class Books:
    """What this rank's batches held, and what those of all ranks and of the runs before did.

    Args:
        view: the trainer.
        domains: names that domain ids stand for, the same on every rank.
        max_bad_fraction: see `Ledger`.
        record_samples: also write each batch's samples to `ledger/samples-rank-N.csv`.
        before: counts of the run so far, over all ranks, where it is resumed.
        start: the position it goes on from.

    Raises:
        ConfigError: the fraction is outside [0, 1].
        DataError: the record of samples cannot be written.
    """

    def __init__(
        self,
        view: TrainerView,
        domains: Sequence[str],
        max_bad_fraction: float,
        *,
        record_samples: bool = False,
        before: Mapping[str, Counts] | None = None,
        start: int = 0,
    ) -> None:
        self.view = view
        self.domains = tuple(domains)
        self.folder = view.run_dir and view.run_dir / "ledger"
        path = self.folder and self.folder / f"rank-{view.rank:05d}.jsonl"
        self.ledger = Ledger(path, max_bad_fraction, before=before, start=start)
        self._record = None
        if record_samples and self.folder:
            self._record = SampleRecord(self.folder / f"samples-rank-{view.rank:05d}.csv", is_new=start == 0)

    def enter(self, batch: Mapping[str, Tensor], bad: Sequence[Any], *, consumed: int, size: int, step: int) -> None:
        """Enter a batch as it is handed to the model.

        Args:
            batch: its tensors.
            bad: the bad samples that were met in making it.
            consumed: plan positions that the model has gone through.
            size: samples of the whole batch, over all ranks.
            step: the optimiser step it belongs to.

        Raises:
            DataError: too large a part of a domain is bad, a file cannot be written, or the samples are not those that
                the plan has for this rank.
        """
        index = batch["index"].tolist()
        positions = range(index[0] - self.view.rank, index[0] - self.view.rank + size)
        if index != list(positions[self.view.rank :: self.view.world_size]):
            raise DataError(
                f"A training batch of rank {self.view.rank} holds the plan positions {index[:4]} ..., which are not "
                f"every {self.view.world_size}th of a batch of {size}: another sampler or loader has taken the plan's "
                "place; take it out of the recipe (trainer.use_distributed_sampler must be false)."
            )
        self.ledger.settle(consumed)
        self.ledger.record([self.domains[number] for number in batch["domain"].tolist()], bad, positions)
        if self._record:
            self._record.write(step, index, batch["row"].tolist())

    def totals(self, consumed: int) -> dict[str, Counts]:
        """Return each domain's counts over all ranks and the runs before; all ranks have to call this.

        Args:
            consumed: plan positions that the model has gone through; what lies behind does not count.

        Raises:
            DataError: samples of the plan were left out or came twice.
        """
        self.ledger.settle(consumed)
        own = self.ledger.settled()
        counts = [own.get(domain, Counts(0, 0)) for domain in self.domains]
        values = torch.tensor([[entry.planned, entry.quarantined] for entry in counts], dtype=torch.int64)
        summed = self.view.sum_over_ranks(values).tolist()
        of_all = {domain: Counts(*pair) for domain, pair in zip(self.domains, summed, strict=True) if pair[0]}
        return added(self.ledger.before, of_all)

    def close(self, position: PlanPosition) -> None:
        """Check that every position was accounted for, print the counts and write `ledger/summary.json`.

        Args:
            position: where training ended.

        Raises:
            DataError: seen + quarantined is not planned, or the summary cannot be written.
        """
        counts = self.totals(position.consumed)
        planned = sum(entry.planned for entry in counts.values())
        if planned != position.consumed:
            raise DataError(
                f"The books do not balance: training went through {position.consumed:,} plan positions, and the ledger "
                f"has {planned:,} samples (seen + quarantined, over all ranks). Samples were lost or came twice; "
                "please report this with the recipe, and take out callbacks or loaders that replace batches."
            )
        if not planned:
            return
        lines = [f"  {domain}: {told({domain: entry})}" for domain, entry in counts.items()]
        rank_zero_info("\n".join([f"Data of all ranks: {told(counts, self.folder)}", *lines]))
        if self.folder and self.view.rank == 0:
            write_summary(self.folder / "summary.json", position, counts)


def counts_state(counts: Mapping[str, Counts]) -> dict[str, list[int]]:
    """Return counts as plain values, which a checkpoint may hold: domain -> [planned, quarantined]."""
    return {domain: [entry.planned, entry.quarantined] for domain, entry in counts.items()}


def counts_from_state(state: Mapping[str, Sequence[int]]) -> dict[str, Counts]:
    """Return the counts that a checkpoint holds."""
    return {domain: Counts(*pair) for domain, pair in state.items()}


def write_summary(path: Path, position: PlanPosition, counts: Mapping[str, Counts]) -> None:
    """Write what became of all planned samples, whole or not at all.

    Raises:
        DataError: the folder cannot be written, or its disk is full.
    """
    domains = {
        domain: {"planned": entry.planned, "seen": entry.seen, "quarantined": entry.quarantined}
        for domain, entry in counts.items()
    }
    sums = {name: sum(entry[name] for entry in domains.values()) for name in ("planned", "seen", "quarantined")}
    text = json.dumps({**sums, "domains": domains, "position": position.state_dict()}, indent=1, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable("summary of the ledger", path, error) from error


class SampleRecord:
    """Writes which samples each batch of one rank held, a line of CSV each, as it is handed to the model.

    A resumed run appends; a step that is done again is there again.

    Args:
        path: the file; columns `step`, `index` (place in the plan) and `row` (in the dataset's index).
        is_new: begin it anew.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path, *, is_new: bool) -> None:
        self.path = path
        if is_new or not path.exists():
            self._put("w", "step,index,row\n")

    def write(self, step: int, index: Sequence[int], rows: Sequence[int]) -> None:
        """Append one batch.

        Raises:
            DataError: the file cannot be written.
        """
        self._put("a", "".join(f"{step},{place},{row}\n" for place, row in zip(index, rows, strict=True)))

    def _put(self, mode: str, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _unwritable("record of samples", self.path, error) from error


def _unwritable(what: str, path: Path, error: OSError) -> DataError:
    return DataError(
        f"The {what} {path} cannot be written ({error.strerror or error}); free some space or set "
        "trainer.default_root_dir to a folder that can be written."
    )
