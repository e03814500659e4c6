"""How hidden states are stored: as they are, in half precision, or as 8-bit codes with a scale a token.

Legend: B images, N tokens, D channels of a layer, R channels that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.errors import DataError
from distill.standardise import FeatureStatistics, equalising_rotation

Compression = Literal["none", "fp16", "int8", "pca"]

INT8_MAX = 127
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the R directions of largest variance, turned so that all R have the same variance.

    Equal variances make the largest code of a token small, so that 8 bits go further.

    Attributes:
        mean: float32 `[D]`.
        matrix: float32 `[R, D]`, orthonormal rows.
    """

    mean: Tensor
    matrix: Tensor

    def to(self, device: torch.device) -> Basis:
        """Return the basis on a device."""
        return Basis(self.mean.to(device), self.matrix.to(device))


def fit_basis(statistics: FeatureStatistics, dims: int) -> Basis:
    """Return the basis of the leading principal directions.

    Args:
        statistics: of a layer's tokens.
        dims: R at most; a narrower layer keeps all its channels, rotated.

    Raises:
        ValueError: fewer than two tokens were seen, or they are not finite.
    """
    mean, covariance = statistics.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance)
    kept = min(dims, len(values))
    values, vectors = values.flip(0)[:kept].clamp_min(0), vectors.flip(1)[:, :kept]
    return Basis(mean.float(), (equalising_rotation(values) @ vectors.T).float().contiguous())


def encode(tokens: Tensor, compression: Compression, basis: Basis | None) -> tuple[Tensor, Tensor | None]:
    """Return tokens as they are stored.

    Args:
        tokens: `[B, N, D]`, floating point.
        compression: the format.
        basis: of the layer, for "pca".

    Returns:
        Values `[B, N, D or R]`, and float32 scales `[B, N, 1]` where the values are 8-bit codes.

    Raises:
        DataError: a value does not fit half precision.
    """
    if compression == "none":
        return tokens.contiguous(), None
    if compression == "fp16":
        largest = float(tokens[tokens.isfinite()].abs().amax()) if tokens.numel() else 0.0
        if largest > FP16_MAX:
            raise DataError(
                f"A hidden state holds {largest:.3g}, and float16 ends at {FP16_MAX:g}: choose --compression none, "
                "int8 or pca."
            )
        return tokens.half().contiguous(), None
    values = tokens.float()
    if compression == "pca":
        assert basis is not None, "pca has a basis"
        values = (values - basis.mean) @ basis.matrix.T
    # A token that is not finite keeps a scale that is not: it comes back as such, and training leaves it out.
    scales = values.abs().amax(-1, keepdim=True) / INT8_MAX
    codes = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.nan_to_num().to(torch.int8).contiguous(), scales.contiguous()


def decode(values: Tensor, scales: Tensor | None, dtype: torch.dtype, basis: Basis | None) -> Tensor:
    """Return tokens `[B, N, D]` of what `encode` made of them, in `dtype`."""
    if scales is None:
        return values.to(dtype)
    tokens = values.float() * scales
    if basis is not None:
        tokens = tokens @ basis.matrix + basis.mean
    return tokens.to(dtype)
