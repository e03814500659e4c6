"""Encoders of several `probe.json` files, ready to be compared image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from distill.errors import ConfigError, DataError
from distill.probe.results import At, EncoderScores, ProbeResults, TensorEntry
from distill.probe.results_file import read_probe
from distill.probe.rung import PerImage

Which = Literal["students", "all"]
Figure = tuple[str, At | None]
"""A metric, or one point of its curve."""


@dataclass(frozen=True)
class Contender:
    """One encoder of one probe.

    Attributes:
        label: unique in the comparison.
        file: the `probe.json` it comes from.
        results: that file's content.
        scores: the encoder's figures.
    """

    label: str
    file: Path
    results: ProbeResults
    scores: EncoderScores

    @property
    def entries(self) -> dict[Figure, TensorEntry]:
        """Where the per-image parts of its figures lie."""
        mine = (entry for entry in self.results.tensors if entry.encoder == self.scores.name)
        return {(entry.metric, entry.at): entry for entry in mine}


def find_probe(path: Path) -> Path:
    """Return the `probe.json` that a path on the command line means.

    Raises:
        ConfigError: there is none.
    """
    file = path / "probe.json" if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise ConfigError(f"{path} has no probe.json. Run `distill probe {path} --data SHARDS` first.")
    raise ConfigError(
        f"{path} does not exist. Give a probe.json, a run directory, or a folder that holds a probe.json."
    )


def read_contenders(probes: Sequence[Path], which: Which) -> list[Contender]:
    """Return the encoders to compare, in the order of the files.

    Args:
        probes: `probe.json` files, run directories, or folders with a `probe.json`.
        which: "students" takes of each file the distilled students, or, where it has none, the encoder it was made
            for; "all" takes every encoder.

    Raises:
        ConfigError: a path has no probe, or one is given twice.
        DataError: a file is damaged or of another format.
    """
    files = [find_probe(path) for path in probes]
    resolved = [file.resolve() for file in files]
    repeated = next((file for file in files if resolved.count(file.resolve()) > 1), None)
    if repeated is not None:
        raise ConfigError(f"{repeated} is given twice. Name each probe once.")
    places = _places(files)
    found: list[Contender] = []
    for place, file in zip(places, files, strict=True):
        results = read_probe(file)
        chosen = list(results.encoders) if which == "all" else _judged(results)
        for scores in chosen:
            label = scores.name if len(files) == 1 else place if len(chosen) == 1 else f"{place}/{scores.name}"
            found.append(Contender(label, file, results, scores))
    return found


def _judged(results: ProbeResults) -> list[EncoderScores]:
    """The encoders a probe was made for: its students, else its first encoder that is no initialisation."""
    students = results.of_role("student")
    others = [encoder for encoder in results.encoders if encoder.role != "initial"] or list(results.encoders)
    return students or others[:1]


def _places(files: Sequence[Path]) -> list[str]:
    """Short names of the files: the folder of a `probe.json`, else the file's stem, with a number where they repeat."""
    places: list[str] = []
    for file in files:
        name = file.resolve().parent.name if file.name == "probe.json" else file.stem
        count = sum(place == name or place.startswith(f"{name} (") for place in places)
        places.append(f"{name} ({count + 1})" if count else name)
    return places


class PerImageFiles:
    """Reads the per-image parts of figures, each file opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def read(self, contender: Contender, figure: Figure) -> PerImage:
        """Return the parts of one figure, in ascending order of rows.

        Raises:
            DataError: the file is missing, damaged or does not hold the figure.
        """
        prefix = contender.entries[figure].prefix
        file = self._file(contender)
        names = set(cast(list[str], file.keys()))
        missing = [part for part in ("rows", "numerator", "denominator", "groups") if f"{prefix}/{part}" not in names]
        if missing:
            raise DataError(
                f"{contender.results.per_image} has no {', '.join(f'{prefix}/{part}' for part in missing)}, which "
                f"{contender.file} promises: the two belong to different probes. Run `distill probe` again."
            )
        rows = self._integers(file, f"{prefix}/rows")
        order = np.argsort(rows, kind="stable")
        domains = self._integers(file, f"{prefix}/domains")[order] if f"{prefix}/domains" in names else None
        return PerImage(
            rows[order],
            self._columns(file, f"{prefix}/numerator")[order],
            self._columns(file, f"{prefix}/denominator")[order],
            self._integers(file, f"{prefix}/groups")[order],
            domains,
        )

    def _file(self, contender: Contender) -> Any:
        path = contender.results.per_image
        if path is None:
            raise DataError(f"{contender.file} names no file of per-image values. Run `distill probe` again.")
        if path not in self._open:
            if not path.is_file():
                raise DataError(
                    f"{path} is missing: {contender.file} keeps its per-image values there, and without them nothing "
                    "can be paired. Copy it beside the probe.json, or run `distill probe` again."
                )
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} cannot be read: {error}. Run `distill probe` again.") from error
        return self._open[path]

    @staticmethod
    def _integers(file: Any, name: str) -> NDArray[np.int64]:
        return np.asarray(file.get_tensor(name), dtype=np.int64).reshape(-1)

    @staticmethod
    def _columns(file: Any, name: str) -> NDArray[np.float64]:
        values = np.asarray(file.get_tensor(name), dtype=np.float64)
        return values.reshape(len(values), -1)
