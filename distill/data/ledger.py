"""What became of every planned sample: seen + quarantined = planned, with the reason for each that was quarantined."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
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


class Ledger:
    """Counts the samples one rank consumed, keeps the bad ones in a file, and stops a run that meets too many.

    Every bad sample, and every substitute that was bad too (`attempt` above 0), is a line of JSON. Only the planned one
    counts as quarantined. A run that is resumed appends; a step that is done again after a crash writes its lines
    again, with the same `index`.

    Args:
        path: file of this rank, made when the first bad sample is met; None keeps no file.
        max_bad_fraction: largest fraction of a domain's samples that may be bad, in [0, 1], once 100 were planned.

    Raises:
        ConfigError: the fraction is outside [0, 1].
    """

    def __init__(self, path: Path | None, max_bad_fraction: float = 0.01) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {max_bad_fraction}; it must lie in [0, 1].")
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self._planned: Counter[str] = Counter()
        self._quarantined: Counter[str] = Counter()

    def record(self, domains: Sequence[str], bad: Sequence[BadSample]) -> None:
        """Count one batch.

        Args:
            domains: the domain of each sample of the batch; a substitute has that of the sample it stands for.
            bad: the bad samples that were met in making the batch.

        Raises:
            DataError: too large a part of a domain is bad, or the ledger cannot be written.
        """
        self._planned.update(domains)
        self._write(bad)
        for entry in bad:
            if entry.attempt == 0:
                self._quarantined[entry.domain] += 1
                self._log(entry)
        for domain in {entry.domain for entry in bad}:
            self._check(domain)

    def counts(self) -> dict[str, Counts]:
        """Return the counts of each domain that was met."""
        return {name: Counts(self._planned[name], self._quarantined[name]) for name in sorted(self._planned)}

    def summary(self) -> str:
        """Return one line: planned = seen + quarantined."""
        planned, bad = self._planned.total(), self._quarantined.total()
        line = f"{planned:,} samples planned = {planned - bad:,} seen + {bad:,} quarantined"
        return f"{line} (reasons in {self.path})" if bad and self.path else line

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self.path is None or not bad:
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

    def _log(self, entry: BadSample) -> None:
        count = self._quarantined[entry.domain]
        if count == 1 or count % LOG_EVERY == 0:
            log.warning(
                "bad sample number %d of domain %s, replaced: %s: %s (%s)",
                *(count, entry.domain, entry.shard, entry.key, entry.reason),
            )

    def _check(self, domain: str) -> None:
        planned, bad = self._planned[domain], self._quarantined[domain]
        if planned >= MIN_PLANNED and bad > self.max_bad_fraction * planned:
            raise DataError(
                f"The domain {domain!r} has {bad:,} bad images among {planned:,} planned ({bad / planned:.1%}), more "
                f"than data.max_bad_fraction = {self.max_bad_fraction:g} allows. {self._where()}Mend its shards, or "
                "raise the limit if so many are expected."
            )

    def _where(self) -> str:
        return f"The reasons are in {self.path}. " if self.path else ""
