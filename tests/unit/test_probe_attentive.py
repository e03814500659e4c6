"""The attentive probe: it is multi-head cross-attention, and sees what a mean over tokens does not."""

import pytest
import torch
from torch.nn import functional as F

from distill.errors import DataError
from distill.probe import attentive
from distill.probe.attentive import AttentiveHeads, _standardised, attentive_probe
from distill.probe.linear import linear_probe
from distill.probe.protocol import Split, split_by_group

NUM_CLASSES = 4


def hidden_signs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of which one, at a random place and marked, bears the class; another like it, unmarked, hides it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % NUM_CLASSES
    tokens = 0.1 * torch.randn(n, 9, 16, generator=generator)
    signs = F.one_hot(torch.arange(NUM_CLASSES), 16).float()
    places = torch.stack([torch.randperm(9, generator=generator) for _ in range(n)])
    rows = torch.arange(n)
    tokens[rows, places[:, 0]] += 3 * signs[targets]
    tokens[rows, places[:, 0], 15] += 3
    for other in range(1, NUM_CLASSES):
        tokens[rows, places[:, other]] += 3 * signs[(targets + other) % NUM_CLASSES]
    return tokens, targets


def split_of(targets: torch.Tensor) -> Split:
    return split_by_group([""] * len(targets), targets.numpy(), seed=0)


def test_it_finds_the_token_that_a_mean_over_tokens_hides() -> None:
    tokens, targets = hidden_signs(800, seed=0)
    split = split_of(targets)
    truth = targets[torch.from_numpy(split.test)]
    result = attentive_probe(tokens, targets, split, num_classes=NUM_CLASSES, seed=0)
    assert float((result.predictions == truth).double().mean()) > 0.95
    mean = linear_probe(tokens.mean(1), targets, split, num_classes=NUM_CLASSES)
    assert float((mean.predictions == truth).double().mean()) < 0.5
    scores = {(lr, decay): score for lr, decay, score in result.path}
    assert scores[result.learning_rate, result.weight_decay] == max(scores.values())


def test_a_probe_computes_multi_head_cross_attention() -> None:
    dim, heads = 128, 2
    tokens = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(1))
    probe = AttentiveHeads(dim, 7, 2, seed=0)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        ours = probe(tokens)[1]
        # Heads read all channels: keys are the tokens themselves, queries the learned vectors.
        keys = tokens[:, None].expand(-1, heads, -1, -1)
        values = torch.einsum("btd,hdw->bhtw", tokens, probe.values[1])
        queries = probe.queries[1][None, :, None].expand(3, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[:, :, 0].flatten(1)
        theirs = F.linear(mixed + probe.value_biases[1], probe.classifiers[1].T, probe.biases[1])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_probes_side_by_side_do_not_touch_each_other() -> None:
    tokens, targets = hidden_signs(120, seed=2)
    split = split_of(targets)
    common = {"num_classes": NUM_CLASSES, "seed": 0, "num_steps": 20}
    alone = attentive_probe(tokens, targets, split, settings=[(1e-3, 0.1)], **common)
    beside = attentive_probe(tokens, targets, split, settings=[(1e-3, 0.1), (1e-6, 0.0)], **common)
    assert beside.path[0] == alone.path[0]
    if beside.learning_rate == 1e-3:
        assert torch.allclose(beside.select_logits, alone.select_logits, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_tokens_are_standardised_by_the_fit_split_and_a_constant_channel_is_only_centred(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(attentive, "AT_ONCE_BYTES", 0)
    tokens = 100 + 5 * torch.randn(40, 6, 3, generator=torch.Generator().manual_seed(3))
    tokens[:, :, 2] = 7.0
    tokens[30:] += 1000
    data = _standardised(tokens.half().float(), torch.arange(30))
    assert data.is_standardised == at_once
    batch = data.batch(torch.arange(30)).flatten(0, 1)
    assert torch.allclose(batch[:, :2].mean(0), torch.zeros(2), atol=1e-4)
    assert torch.allclose(batch[:, :2].std(0, correction=0), torch.ones(2), atol=1e-4)
    assert torch.equal(batch[:, 2], torch.zeros(180))


def test_settings_that_all_diverge_are_an_error() -> None:
    tokens, targets = hidden_signs(60, seed=4)
    with pytest.raises(DataError, match="diverged"):
        attentive_probe(
            tokens,
            targets,
            split_of(targets),
            num_classes=NUM_CLASSES,
            seed=0,
            settings=[(float("inf"), 0.0)],
            num_steps=3,
        )


def test_pooled_features_are_refused() -> None:
    _, targets = hidden_signs(60, seed=5)
    with pytest.raises(ValueError, match=r"must be \[N, T, D\]"):
        attentive_probe(torch.randn(60, 16), targets, split_of(targets), num_classes=NUM_CLASSES, seed=0)
