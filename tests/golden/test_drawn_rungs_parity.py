"""Error rates, IoU and ridge regression equal independent implementations of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score, r2_score
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.text import CharErrorRate

from distill.probe.chart import STRENGTHS, ridge_probe
from distill.probe.ctc_head import ctc_loss, encode
from distill.probe.ocr import edit_distances
from distill.probe.protocol import split_by_group
from distill.probe.rung import ratio_of_sums
from distill.probe.segmentation import class_shares, intersections_and_unions, upsample


def levenshtein(a: str, b: str) -> int:
    """Wagner and Fischer's table, written out."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, start=1):
        for j, y in enumerate(b, start=1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


def test_the_character_error_rate_is_torchmetrics_and_the_table_s() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("0123"), rng.integers(1, 9))) for _ in range(60)]
    read = ["".join(rng.choice(list("0123"), rng.integers(0, 11))) for _ in range(60)]
    edits = edit_distances(read, texts)
    assert edits.tolist() == [levenshtein(a, b) for a, b in zip(read, texts, strict=True)]
    lengths = np.asarray([len(text) for text in texts], dtype=np.float64)
    ours = ratio_of_sums(edits[:, None], lengths[:, None], "error_rate")
    assert ours == pytest.approx(float(CharErrorRate()(read, texts)), abs=1e-6)


def test_mean_iou_is_torchmetrics_and_scikit_learn_s() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 5, (6, 20, 20), generator=generator)
    predicted = torch.where(torch.rand(true.shape, generator=generator) < 0.6, true, true.roll(1))
    parts = intersections_and_unions(predicted, true, 6)
    ours = ratio_of_sums(*parts, "iou")
    assert ours == pytest.approx(float(MulticlassJaccardIndex(6, average="macro")(predicted, true)), abs=1e-6)
    flat = true.flatten().numpy(), predicted.flatten().numpy()
    assert ours == pytest.approx(jaccard_score(*flat, average="macro"), abs=1e-12)
    assert parts[1].sum() >= parts[0].sum()


def test_shares_of_classes_are_means_over_the_cells() -> None:
    masks = torch.randint(0, 6, (2, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    shares = class_shares(masks, 4)
    assert shares.shape == (2, 6, 4, 4)
    assert torch.allclose(shares.sum(1), torch.ones(2, 4, 4))
    assert float(shares[1, 3, 2, 1]) == pytest.approx(float((masks[1, 6:9, 3:6] == 3).double().mean()))


def test_logits_are_upsampled_between_the_middles_of_cells() -> None:
    coarse = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    assert upsample(coarse, 4)[0, 0].tolist() == [[0.0, 0.25, 0.75, 1.0]] * 4


def test_ridge_in_the_span_of_the_images_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(2.0, 3.0, (80, 120)).astype(np.float32))
    values = features[:, :2].double().numpy() + rng.normal(0, 0.5, (80, 2))
    split = split_by_group([""] * 80, np.zeros(80, dtype=np.int64), seed=0)
    found = ridge_probe(features, values, split)
    fit = features[split.fit]
    x = ((features - fit.mean(0)) / fit.std(0, correction=0)).double().numpy()
    seen = np.concatenate([split.fit, split.select])
    centred = x[seen] - x[seen].mean(0)
    # scikit-learn's alpha is not divided by the number of features, nor by the Gram matrix's diagonal.
    alpha = found.strength * (centred**2).sum() / len(seen)
    reference = Ridge(alpha).fit(x[seen], values[seen])
    assert found.predictions == pytest.approx(reference.predict(x[split.test]), abs=1e-4)
    assert found.strength in STRENGTHS
    true = values[split.test]
    ours = ratio_of_sums((found.predictions - true) ** 2, (true - true.mean(0)) ** 2, "r2")
    assert ours == pytest.approx(r2_score(true, found.predictions), abs=1e-9)


def test_the_ctc_loss_is_the_sum_over_all_paths() -> None:
    scores = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0)).log_softmax(2)
    labels, lengths = encode(["ab"], "ab")
    # Three steps write "ab" as ab-, a-b, -ab, aab, abb (0 is the blank).
    paths = [(1, 2, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2), (1, 2, 2)]
    total = sum(float(scores[[0, 1, 2], 0, list(path)].sum().exp()) for path in paths)
    assert float(ctc_loss(scores, torch.tensor([3]), labels, lengths)) == pytest.approx(-np.log(total) / 2, abs=1e-5)
