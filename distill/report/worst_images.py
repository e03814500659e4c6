"""The scored images on which a student is least faithful to its teacher, from the probe's per-image values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import DataError, DistillError
from distill.probe.contenders import Contender, PerImageFiles
from distill.probe.probe_set import ProbeSet, open_probe_set
from distill.probe.results import EncoderScores, ProbeResults
from distill.report.thumbnails import THUMBNAIL_PX, SmallPictures
from distill.report.verdict import FIDELITY

PER_DOMAIN = 3


@dataclass(frozen=True)
class WorstImage:
    """One image: its picture's style class, class name, and the fidelity of student and initialisation."""

    picture: str
    label: str
    value: float
    initial: float | None
    image: Tensor


@dataclass(frozen=True)
class WorstImages:
    """The worst images of one student, by domain, least faithful first."""

    student: str
    domains: tuple[tuple[str, tuple[WorstImage, ...]], ...]


def worst_images(
    results: ProbeResults, file: Path, places: Iterable[Any], pictures: SmallPictures, prefix: str = ""
) -> list[WorstImages]:
    """Return, for each student, the images of each domain with the lowest fidelity.

    Args:
        results: of a probe in format 2.
        file: its `probe.json`.
        places: where the probed images may lie; the first whose fingerprint is the probe's is used.
        pictures: takes up the pictures.
        prefix: of their style classes, letters; tells runs apart.

    Raises:
        DataError: there are no per-image values, or the probed images are not to be found.
    """
    students = results.of_role("student")
    figures = {encoder.name: _fidelity(results, file, encoder) for encoder in results.encoders}
    if not any(figures[student.name] for student in students):
        raise DataError("The probe has no fidelity by image: it had no teacher, or its format is an older one.")
    probed = _probed_set(results, places)
    found: list[WorstImages] = []
    for student in students:
        mine, initial = figures[student.name], results.initial_of(student.name)
        if mine and max(mine) < len(probed):
            before = figures[initial.name] if initial else {}
            found.append(_of_student(student.name, mine, before, probed, pictures, prefix))
    return found


def _fidelity(results: ProbeResults, file: Path, encoder: EncoderScores) -> dict[int, float]:
    """An encoder's fidelity by row of the data; empty where it was not measured."""
    contender = Contender(encoder.name, file, results, encoder)
    if (FIDELITY, None) not in contender.entries:
        return {}
    parts = PerImageFiles().read(contender, (FIDELITY, None))
    below: NDArray[np.float64] = parts.denominator.sum(1)
    counted = below > 0
    values = parts.numerator.sum(1)[counted] / below[counted]
    return dict(zip(parts.rows[counted].tolist(), values.tolist(), strict=True))


def _probed_set(results: ProbeResults, places: Iterable[Any]) -> ProbeSet:
    wanted = str(results.data.get("fingerprint", ""))
    tried: list[str] = []
    for place in places:
        if not isinstance(place, str) or not place or place in tried:
            continue
        tried.append(place)
        try:
            found = open_probe_set(place, THUMBNAIL_PX)
        except DistillError:
            continue
        if found.fingerprint == wanted:
            return found
    raise DataError(
        f"The probed images are not to be found: none of {', '.join(tried) or 'no place'} holds the data with the "
        f"fingerprint {wanted[:12]}. Give the probe's data by --data."
    )


def _of_student(
    name: str,
    mine: dict[int, float],
    before: dict[int, float],
    probed: ProbeSet,
    pictures: SmallPictures,
    prefix: str,
) -> WorstImages:
    by_domain: dict[str, list[int]] = {}
    for row in sorted(mine, key=lambda row: (mine[row], row)):
        rows = by_domain.setdefault(probed.domains[int(probed.domain_ids[row])], [])
        if len(rows) < PER_DOMAIN:
            rows.append(row)
    domains: list[tuple[str, tuple[WorstImage, ...]]] = []
    for domain, rows in sorted(by_domain.items()):
        entries: list[WorstImage] = []
        for row in rows:
            image = cast(Tensor, probed[row]["image"])
            label = int(probed.labels[row])
            caption = probed.label_names[label].removeprefix(f"{domain}/") if label >= 0 else ""
            picture = pictures.add(f"{prefix}w{row}", image)
            entries.append(WorstImage(picture, caption, mine[row], before.get(row), image))
        domains.append((domain, tuple(entries)))
    return WorstImages(name, tuple(domains))
