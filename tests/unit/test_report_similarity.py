"""What the page carries of patch tokens gives nearly the similarities of the tokens themselves."""

from __future__ import annotations

import base64

import numpy as np
import torch
import torch.nn.functional as F

from distill.report.gallery import ChosenImages
from distill.report.neighbours import nearest, pooled_tokens
from distill.report.similarity import (
    COMPONENTS,
    MIN_COMPONENTS,
    affordable_components,
    colours_of,
    page_data,
    patch_at,
    patch_features,
    salient_patch,
)
from distill.report.thumbnails import SmallPictures


def tokens(images: int = 6, grid: int = 7, width: int = 96, *, offset: float = 5.0) -> torch.Tensor:
    """Tokens of a falling spectrum, as encoders have, round a mean that all share."""
    scale = 0.8 ** torch.arange(width, dtype=torch.float32)
    return torch.randn(images, grid, grid, width) * scale + offset


def test_similarities_of_the_page_are_those_of_the_tokens_less_their_mean() -> None:
    patches = tokens()
    features = patch_features(patches, num_shown=2)
    assert features.codes.shape == (2, 7, 7, COMPONENTS)
    assert features.kept > 0.98
    centred = patches[1] - patches.flatten(0, 2).mean(0)
    exact = F.cosine_similarity(centred, centred[3, 4], dim=-1).numpy()
    shown = features.similarity(1, 3, 4)
    assert shown[3, 4] == np.float64(1.0) or abs(shown[3, 4] - 1) < 1e-9
    assert np.abs(shown - exact).max() < 0.05


def test_fine_grids_are_averaged_and_narrow_encoders_keep_all_they_have() -> None:
    assert patch_features(tokens(1, 40, 8), 1).codes.shape == (1, 32, 32, 8)
    assert patch_features(torch.zeros(1, 3, 3, 4), 1).similarity(0, 1, 1).tolist() == np.zeros((3, 3)).tolist()


def test_reducing_twice_gives_the_same_codes_whatever_the_state_of_the_generator() -> None:
    patches = tokens()
    first = patch_features(patches, 2)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert np.array_equal(first.codes, patch_features(patches, 2).codes)
    assert torch.equal(before, torch.random.get_rng_state())


def test_many_encoders_get_fewer_components_so_that_the_page_stays_small() -> None:
    assert affordable_components(2, 8, grid=14) == COMPONENTS
    assert affordable_components(12, 8) < COMPONENTS
    assert affordable_components(1000, 100) == MIN_COMPONENTS


def test_the_marked_patch_is_the_one_that_stands_out() -> None:
    patches = torch.randn(2, 7, 7, 16) * 0.01
    patches[1, 5, 2] += 3.0
    features = patch_features(patches, 2)
    place = salient_patch(features, 1)
    assert patch_at(features, place) == (5, 2)
    assert patch_at(features, (1.0, 0.0)) == (6, 0)


def test_the_page_holds_codes_that_decode_to_the_same_numbers() -> None:
    features = patch_features(tokens(), 2)
    (encoder,) = page_data([features])["encoders"]
    decoded = np.frombuffer(base64.b64decode(encoder["codes"][1]), dtype=np.int8)
    assert np.array_equal(decoded.reshape(encoder["rows"], encoder["columns"], encoder["dim"]), features.codes[1])
    dark, bright = colours_of(np.array([[-0.5, 1.0]]))[0].astype(int).sum(-1)
    assert dark < 10
    assert bright > 600


def test_neighbours_leave_out_the_query_and_its_group_and_count_what_the_teacher_shares() -> None:
    count = 24
    directions = torch.eye(count // 2).repeat_interleave(2, 0)  # images in pairs of equal content
    patches = directions[:, None, None, :].expand(count, 2, 2, -1) + 0.01 * torch.rand(count, 1, 1, count // 2)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    captions = tuple(("ocr", f"kind {i // 2}") for i in range(count))
    groups = ("", "", "g", "g", *[""] * (count - 4))
    chosen = ChosenImages(images, captions, groups, num_shown=3)
    pooled = pooled_tokens(patches)
    swapped = pooled.clone()
    swapped[[1, 4]] = pooled[[4, 1]]
    encoders = [("teacher", pooled), ("copy", pooled), ("other", torch.randn(count, 9)), ("swapped", swapped)]
    found = nearest(encoders, chosen, SmallPictures())
    (_, none, own), (_, copied, _), (_, shared, _), (_, _, other) = found[0].lists
    assert own[0].caption == "ocr, kind 0"
    assert (none, copied) == (None, len(own))
    assert shared is not None
    assert shared < len(own)
    assert other[0].caption == "ocr, kind 2"
    assert all(entry.picture != "t3" for _, _, entries in found[2].lists for entry in entries)  # of the query's group
    assert all(entry.picture != f"t{i}" for i, query in enumerate(found) for _, _, e in query.lists for entry in e)
