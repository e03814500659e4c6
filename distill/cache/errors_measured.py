"""What a compression loses, measured on hidden states that its basis was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.cache.compression import Basis, Compression
from distill.cache.memory import States
from distill.cache.record import LayerName, decode_records, encode_records, lay_out

WORST_QUANTILE = 0.99
"""The worst percentile: one token in a hundred has a larger error."""


def token_errors(stored: Tensor, true: Tensor) -> Tensor:
    """Return `1 - cosine` of each token, float64 `[N]`.

    Args:
        stored: `[..., D]`.
        true: `[..., D]`.
    """
    a, b = stored.double().flatten(0, -2), true.double().flatten(0, -2)
    # From the difference of unit vectors: 1 - cos itself would lose half of the digits.
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    return 0.5 * (a - b).square().sum(-1)


def measure_errors(
    states: list[States], compression: Compression, dims: int, bases: Mapping[LayerName, Basis]
) -> list[dict[str, Any]]:
    """Return, for each teacher and layer, the cosine error of stored against uncompressed tokens.

    "centred" errors are those after the mean token was subtracted from both: training that standardises its targets
    sees them, and a large common mean hides the others.

    Args:
        states: batches of hidden states.
        compression: the format.
        dims: channels that "pca" keeps at most.
        bases: of "pca".

    Returns:
        Entries with teacher, layer, `mean`, `worst_percentile`, `centred_mean` and `centred_worst_percentile`.
    """
    layout = lay_out(states[0], compression, dims)
    layers = {name: len(found) for name, found in states[0].items()}
    back = [decode_records(encode_records(batch, layout, bases), layout, bases, layers) for batch in states]
    entries: list[dict[str, Any]] = []
    for name, count in layers.items():
        for layer in range(-count, 0):
            batches = [(_tokens(a, name, layer), _tokens(b, name, layer)) for a, b in zip(back, states, strict=True)]
            mean = torch.stack([true.mean(0) for _, true in batches]).mean(0)
            plain = torch.cat([token_errors(stored, true) for stored, true in batches])
            centred = torch.cat([token_errors(stored - mean, true - mean) for stored, true in batches])
            entries.append(
                {
                    "teacher": name,
                    "layer": layer,
                    "tokens": len(plain),
                    "mean": float(plain.mean()),
                    "worst_percentile": quantile(plain),
                    "centred_mean": float(centred.mean()),
                    "centred_worst_percentile": quantile(centred),
                }
            )
    return entries


def quantile(values: Tensor) -> float:
    """Return the value that one in a hundred exceeds; of any number of values, unlike `torch.quantile`."""
    return float(values.sort().values[min(len(values) - 1, int(WORST_QUANTILE * len(values)))])


def _tokens(states: States, teacher: str, layer: int) -> Tensor:
    return torch.cat([part.flatten(0, -2).double() for part in states[teacher][layer]])
