"""Which images an encoder finds closest to an image, beside what the teacher finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.report.gallery import ChosenImages
from distill.report.thumbnails import SmallPictures

TOP_K = 5


@dataclass(frozen=True)
class Neighbour:
    """One image of a list.

    Attributes:
        picture: its style class.
        caption: domain and class.
        similarity: cosine with the query.
        is_shared: whether it is also among the teacher's nearest.
        image: `[3, S, S]`, uint8.
    """

    picture: str
    caption: str
    similarity: float
    is_shared: bool
    image: Tensor


@dataclass(frozen=True)
class Neighbours:
    """An image and its nearest by every encoder.

    Attributes:
        picture: style class of the query.
        domain: of the query.
        label: of the query, or "".
        image: the query, `[3, S, S]`, uint8.
        lists: (encoder's heading, how many are also the teacher's or None for the teacher, nearest first).
    """

    picture: str
    domain: str
    label: str
    image: Tensor
    lists: tuple[tuple[str, int | None, tuple[Neighbour, ...]], ...]


def pooled_tokens(patches: Tensor) -> Tensor:
    """Return the mean token `[N, D]` of each image, float32."""
    return patches.flatten(1, 2).float().mean(1)


def nearest(encoders: Sequence[tuple[str, Tensor]], chosen: ChosenImages, pictures: SmallPictures) -> list[Neighbours]:
    """Return each shown image's nearest among all other images, by the cosine of mean tokens less their mean.

    Images of the query's own group (photograph, document) are left out: finding them would show nothing.

    Args:
        encoders: (heading, `[N, D]` mean tokens), the teacher first.
        chosen: the images.
        pictures: takes up the pictures that are shown.
    """
    similarities = [_similarities(pooled) for _, pooled in encoders]
    found: list[Neighbours] = []
    for query in range(chosen.num_shown):
        allowed = _allowed(chosen, query)
        tops = [_top(similarity[query], allowed) for similarity in similarities]
        lists: list[tuple[str, int | None, tuple[Neighbour, ...]]] = []
        for i, ((heading, _), top) in enumerate(zip(encoders, tops, strict=True)):
            entries = tuple(
                Neighbour(
                    pictures.add(f"t{at}", chosen.images[at]),
                    ", ".join(filter(None, chosen.captions[at])),
                    float(similarities[i][query, at]),
                    i > 0 and at in tops[0],
                    chosen.images[at],
                )
                for at in top
            )
            lists.append((heading, None if i == 0 else sum(entry.is_shared for entry in entries), entries))
        image = chosen.images[query]
        picture = pictures.add(f"t{query}", image)
        found.append(Neighbours(picture, *chosen.captions[query], image, tuple(lists)))
    return found


def _similarities(pooled: Tensor) -> Tensor:
    directions = F.normalize(pooled.double() - pooled.double().mean(0), dim=-1)
    return directions @ directions.T


def _allowed(chosen: ChosenImages, query: int) -> list[int]:
    group = chosen.groups[query]
    return [at for at, other in enumerate(chosen.groups) if at != query and not (group and other == group)]


def _top(similarity: Tensor, allowed: Sequence[int]) -> list[int]:
    at = torch.tensor(list(allowed), dtype=torch.long)
    best = similarity[at].topk(min(TOP_K, len(at))).indices
    return at[best].tolist()
