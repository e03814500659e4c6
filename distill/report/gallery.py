"""The images that the page shows, and the patch tokens of teacher and students on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from distill.checkpoint import RunDir, load_student, load_teacher
from distill.data.fetch import RowDataset
from distill.data.index import DatasetIndex
from distill.encoder import Encoder
from distill.errors import ConfigError, DataError

FIT_IMAGES_PER_DOMAIN = 12
"""Images of each domain, beside those shown: the linear maps are fitted on them, and neighbours sought among them."""

_BATCH_SIZE = 4
_SEED = 0
_MAX_BAD_PER_DOMAIN = 16


@dataclass(frozen=True)
class ChosenImages:
    """Images for the page, the shown ones first.

    Attributes:
        images: `[N, 3, S, S]`, uint8.
        captions: (domain, class name or "") of each image.
        groups: group of each image; "" for none.
        num_shown: how many of them are shown.
    """

    images: Tensor
    captions: tuple[tuple[str, str], ...]
    groups: tuple[str, ...]
    num_shown: int


@dataclass(frozen=True)
class Viewer:
    """An encoder that looks at the images.

    Attributes:
        heading: what the page calls it.
        role: "teacher", "initial" or "student".
        load: builds it with its weights.
    """

    heading: str
    role: str
    load: Callable[[], nn.Module]


def choose_images(index: DatasetIndex, dataset: RowDataset, per_domain: int) -> ChosenImages:
    """Choose images of each domain by a fixed seed, some to show and some to fit on.

    Shown images come from different groups where there are enough, and none of the images to fit on shares a group
    with a shown one. Images that cannot be decoded are passed over.

    Args:
        index: the data.
        dataset: gives the images.
        per_domain: images of each domain to show.

    Raises:
        DataError: no image can be decoded, or many of one domain cannot.
    """
    shown: list[tuple[int, Tensor]] = []
    fit: list[tuple[int, Tensor]] = []
    group_of = index.groups
    for number, domain in enumerate(index.domains):
        order = np.random.default_rng([_SEED, number]).permutation(index.rows_of(domain)).tolist()
        taken: set[int] = set()
        groups: set[str] = set()
        # Both filters are read as rows are pulled, so they know the groups taken by then.
        fresh = (row for row in order if group_of[row] not in groups)
        for row, image in islice(_decodable(fresh, dataset, domain), per_domain):
            taken.add(row)
            groups.update({group_of[row]} - {""})
            shown.append((row, image))
        rest = (row for row in order if row not in taken and group_of[row] not in groups)
        fit += islice(_decodable(rest, dataset, domain), FIT_IMAGES_PER_DOMAIN)
    if not shown:
        raise DataError("No image could be shown: the data has no domain with an image in it.")
    chosen = [*shown, *fit]
    return ChosenImages(
        torch.stack([image for _, image in chosen]),
        tuple(caption_of(index, row) for row, _ in chosen),
        tuple(group_of[row] for row, _ in chosen),
        len(shown),
    )


def caption_of(index: DatasetIndex, row: int) -> tuple[str, str]:
    """Return domain and class name ("" for none) of an image; a class named after its domain loses that part."""
    label = int(index.labels[row])
    domain = next((name for name in index.domains if row in index.range_of(name)), "")
    return domain, index.label_names[label].removeprefix(f"{domain}/") if label >= 0 else ""


def _decodable(rows: Iterable[int], dataset: RowDataset, domain: str) -> Iterator[tuple[int, Tensor]]:
    bad = 0
    for row in rows:
        try:
            yield row, cast(Tensor, dataset[row]["image"])
        except DataError as error:
            bad += 1
            if bad > _MAX_BAD_PER_DOMAIN:
                raise DataError(
                    f"{bad} images of the domain {domain!r} cannot be decoded; the last: {error}"
                ) from error


def viewers(runs: Sequence[RunDir]) -> list[Viewer]:
    """Return the encoders of the page: each different teacher, then each student before and after, run by run.

    The first is the first run's first teacher, in whose basis everything is shown.
    """
    found: list[Viewer] = []
    specs: list[object] = []
    for run in runs:
        for name in run.teacher_names[: 1 if run is runs[0] else None]:
            spec = run.spec("teachers", name)[1]
            if spec not in specs:
                specs.append(spec)
                found.append(Viewer(f"teacher {name}", "teacher", partial(_teacher, run, name)))
    for run in runs:
        names = run.student_names
        for name in names:
            for which, heading in (("initial", "initial student"), ("last", "distilled student")):
                label = heading if len(names) == 1 else f"{name}, {heading.split()[0]}"
                label = label if len(runs) == 1 else f"{run.path.resolve().name}: {label}"
                role = "initial" if which == "initial" else "student"
                found.append(Viewer(label, role, partial(_student, run, name, which)))
    return found


def _teacher(run: RunDir, name: str) -> nn.Module:
    return load_teacher(run.path, name=name)[1]


def _student(run: RunDir, name: str, which: str) -> nn.Module:
    return load_student(run.path, name=name, which="initial" if which == "initial" else "last")[1]


@torch.no_grad()
def last_patches(encoder: nn.Module, images: Tensor, device: str) -> Tensor:
    """Return the patch tokens of an encoder's last hidden state, `[N, H, W, D]`, float32, on the CPU.

    Raises:
        ConfigError: the encoder refuses images of that size.
    """
    contract = cast(Encoder, encoder.to(device).eval())
    parts: list[Tensor] = []
    for batch in images.split(_BATCH_SIZE):
        try:
            parts.append(contract.forward_hidden_states(batch.to(device), 1)[-1][1].float().cpu())
        except ValueError as error:
            raise ConfigError(f"The encoder refuses images of {images.shape[-1]} px: {error}") from error
    encoder.to("cpu")
    return torch.cat(parts)
