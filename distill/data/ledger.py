"""What became of every planned sample: seen + quarantined = planned, with the reason for each that was quarantined."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.data.fetch import BadSample
from distill.errors import ConfigError, DataError

MIN_PLANNED = 100
"""A fraction of fewer samples than this says little."""

LOG_EVERY = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """How many samples of a domain were planned, and how many of these were quarantined; the others were seen."""

    planned: int
    quarantined: int

    @property
    def seen(self) -> int:
        """Planned samples that were used as planned."""
        return self.planned - self.quarantined


@dataclass(frozen=True)
class _OpenBatch:
    """A batch that was handed to the model, which may not have gone through it yet."""

    positions: range
    planned: Counter[str]
    quarantined: Counter[str]


class Ledger:
    """Counts the samples one rank consumed, keeps the bad ones in a file, and stops a run that meets too many.

    Every bad sample, and every substitute that was bad too (`attempt` above 0), is a line of JSON. Only the planned one
    counts as quarantined. A run that is resumed appends; a step that is done again after a crash writes its lines
    again, with the same `index`, and counts once.

    Args:
        path: file of this rank, made when the first bad sample is met; None keeps no file.
        max_bad_fraction: largest fraction of a domain's samples that may be bad, in [0, 1], once 100 were planned.
        before: counts of the run so far, over all ranks, where it is resumed; they count for the limit.
        start: the plan position the first batch has to begin at.

    Raises:
        ConfigError: the fraction is outside [0, 1].
    """

    def __init__(
        self,
        path: Path | None,
        max_bad_fraction: float = 0.01,
        *,
        before: Mapping[str, Counts] | None = None,
        start: int = 0,
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {max_bad_fraction}; it must lie in [0, 1].")
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self.before = dict(before or {})
        self._reached = start
        self._open: list[_OpenBatch] = []
        self._planned: Counter[str] = Counter()
        self._quarantined: Counter[str] = Counter()

    def record(self, domains: Sequence[str], bad: Sequence[BadSample], positions: range | None = None) -> None:
        """Count one batch as it is handed to the model.

        Args:
            domains: the domain of each sample of the batch; a substitute has that of the sample it stands for.
            bad: the bad samples that were met in making the batch.
            positions: those of the whole batch, over all ranks; the batch is settled later. None settles it at once.

        Raises:
            DataError: too large a part of a domain is bad, or the ledger cannot be written.
        """
        planned, quarantined = Counter(domains), Counter(entry.domain for entry in bad if entry.attempt == 0)
        if positions is None:
            self._planned += planned
            self._quarantined += quarantined
        else:
            # What was handed over but not gone through (an epoch was cut short) is handed over again.
            self._open = [batch for batch in self._open if batch.positions.start < positions.start]
            self._open.append(_OpenBatch(positions, planned, quarantined))
        if not bad:
            return
        self._write(bad)
        counts = self.counts()
        self._log([entry for entry in bad if entry.attempt == 0], counts)
        for domain in {entry.domain for entry in bad}:
            self._check(domain, counts)

    def settle(self, consumed: int) -> None:
        """Take the batches as gone through that lie before a position.

        Args:
            consumed: plan positions that the model has gone through, over all ranks.

        Raises:
            DataError: samples of the plan were left out or came twice.
        """
        while self._open and self._open[0].positions.stop <= consumed:
            batch = self._open.pop(0)
            if batch.positions.start != self._reached:
                raise self._out_of_order(batch.positions.start)
            self._reached = batch.positions.stop
            self._planned += batch.planned
            self._quarantined += batch.quarantined
        if self._reached != consumed:
            raise self._out_of_order(consumed)

    def settled(self) -> dict[str, Counts]:
        """Return the counts of this rank's settled batches, for each domain that was met."""
        return {name: Counts(self._planned[name], self._quarantined[name]) for name in sorted(self._planned)}

    def counts(self) -> dict[str, Counts]:
        """Return the counts of all batches of this rank, for each domain that was met."""
        planned = sum((batch.planned for batch in self._open), self._planned)
        quarantined = sum((batch.quarantined for batch in self._open), self._quarantined)
        return {name: Counts(planned[name], quarantined[name]) for name in sorted(planned)}

    def summary(self) -> str:
        """Return one line: planned = seen + quarantined, on this rank."""
        return told(self.counts(), self.path)

    def _out_of_order(self, position: int) -> DataError:
        return DataError(
            f"The training batches do not follow the plan: position {self._reached} was due, and the model stands at "
            f"{position}, so samples were left out or came twice. Another sampler or loader has taken the plan's "
            "place; take it out of the recipe (trainer.use_distributed_sampler must be false)."
        )

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self.path is None:
            return
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in bad)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise DataError(
                f"The ledger of bad samples {self.path} cannot be written ({error.strerror or error}); free some space "
                "or set trainer.default_root_dir to a folder that can be written."
            ) from error

    def _log(self, bad: Sequence[BadSample], counts: Mapping[str, Counts]) -> None:
        met = Counter({domain: counts[domain].quarantined for domain in {entry.domain for entry in bad}})
        met.subtract(entry.domain for entry in bad)
        for entry in bad:
            met[entry.domain] += 1
            count = met[entry.domain]
            if count == 1 or count % LOG_EVERY == 0:
                log.warning(
                    "bad sample number %d of domain %s, replaced: %s: %s (%s)",
                    *(count, entry.domain, entry.shard, entry.key, entry.reason),
                )

    def _check(self, domain: str, counts: Mapping[str, Counts]) -> None:
        of_domain = added(self.before, counts).get(domain, Counts(0, 0))
        planned, bad = of_domain.planned, of_domain.quarantined
        if planned >= MIN_PLANNED and bad > self.max_bad_fraction * planned:
            raise DataError(
                f"The domain {domain!r} has {bad:,} bad images among {planned:,} planned ({bad / planned:.1%}), more "
                f"than data.max_bad_fraction = {self.max_bad_fraction:g} allows. {self._where()}Mend its shards, or "
                "raise the limit if so many are expected."
            )

    def _where(self) -> str:
        return f"The reasons are in {self.path}. " if self.path else ""


def added(first: Mapping[str, Counts], second: Mapping[str, Counts]) -> dict[str, Counts]:
    """Return the sums of two sets of counts, for each domain of either."""
    none = Counts(0, 0)
    pairs = {name: (first.get(name, none), second.get(name, none)) for name in sorted({*first, *second})}
    return {name: Counts(a.planned + b.planned, a.quarantined + b.quarantined) for name, (a, b) in pairs.items()}


def told(counts: Mapping[str, Counts], path: Path | None = None) -> str:
    """Return one line: planned = seen + quarantined, and where the reasons are."""
    planned = sum(entry.planned for entry in counts.values())
    bad = sum(entry.quarantined for entry in counts.values())
    line = f"{planned:,} samples planned = {planned - bad:,} seen + {bad:,} quarantined"
    return f"{line} (reasons in {path})" if bad and path else line
