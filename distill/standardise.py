"""Standardising teacher features, so that no channel speaks louder than its information.

InternViT has no final norm: a few channels of its residual stream are far larger than the rest. The statistics come
from a calibration pass before the first step, are kept in the checkpoint, and never change afterwards.

Legend: D channels, S the student's channels, N tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

StandardiseMode = Literal["none", "mean_std", "phi_s", "procrustes"]

ROTATING = ("phi_s", "procrustes")

VARIANCE_FLOOR = 1e-6
"""Least variance of a channel, relative to the mean variance; dead channels would otherwise be blown up to noise."""


class Standardiser(nn.Module):
    """Maps teacher tokens to zero mean and unit variance.

    Args:
        mode: "none" leaves tokens alone. "mean_std" subtracts each channel's mean and divides by its standard
            deviation (EUPE, arXiv 2603.22387). "phi_s" centres, rotates so that every channel has the same variance,
            and divides by one scalar, so relative errors keep their meaning (PHI-S, arXiv 2410.01680). PHI-S rotates
            by a Hadamard matrix, which not every width has (3200 has none at hand); here Givens rotations give the
            same equal variances for any width. "procrustes" gives targets of the student's width, for `head: none`:
            centred, turned to as many principal directions as the student has channels, rotated to where the
            untrained student's own tokens, centred too, are nearest (orthogonal Procrustes), and divided by one scalar,
            so that the kept directions have a mean variance of 1. Without `whitening`, angles stay, up to what the
            left-out directions held. The student does not begin by learning a change of axes. A teacher narrower than
            the student leaves the other directions 0.
        dim: D.
        student_dim: S, for "procrustes".
        whitening: for "phi_s" and "procrustes", from 0 to 1: each principal direction is divided by its standard
            deviation to this power. What a student learns of its teacher is mostly the few largest directions, and
            its features end up in fewer of them than the teacher's; whitening makes the smaller ones worth learning.
            At 1 all directions have the same variance.
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor
    is_calibrated: Tensor

    def __init__(self, mode: StandardiseMode, dim: int, student_dim: int = 0, whitening: float = 0.0) -> None:
        super().__init__()
        self.mode = mode
        self.whitening = whitening
        self.dim = dim
        self.reads_student = mode == "procrustes"
        self.out_dim = student_dim if self.reads_student else dim
        if mode == "none":
            return
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(self.out_dim))
        self.register_buffer("is_calibrated", torch.tensor(False))
        if mode in ROTATING:
            self.register_buffer("rotation", torch.eye(self.out_dim, dim))

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics are wanted and not yet there."""
        return self.mode != "none" and not bool(self.is_calibrated)

    def calibrate(self, statistics: FeatureStatistics) -> None:
        """Fix the map from accumulated statistics.

        Args:
            statistics: of teacher tokens `[N, D]`; for "procrustes" of these beside the student's, `[N, D + S]`.

        Raises:
            ValueError: fewer tokens than two were seen, or they are not finite.
        """
        if self.mode == "none":
            return
        mean, covariance = statistics.mean_and_covariance()
        if self.mode == "mean_std":
            variance = covariance.diagonal()
            floor = VARIANCE_FLOOR * variance.mean()
            self.scale.copy_(variance.clamp_min(floor).rsqrt())
        else:
            if self.mode == "procrustes":
                rotation, variance = nearest_directions(covariance, self.dim, self.whitening)
            else:
                rotation, variance = equal_variances(covariance, self.whitening)
            self.rotation.copy_(rotation)
            self.scale.fill_(float(variance.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()))
        self.mean.copy_(mean[: self.dim])
        self.is_calibrated.fill_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return standardised tokens `[..., D]`, or `[..., S]`, float32 unless the mode is "none".

        Raises:
            RuntimeError: no statistics were given yet.
        """
        if self.mode == "none":
            return tokens
        if not bool(self.is_calibrated):
            raise RuntimeError(
                f"The {self.mode} standardiser has no statistics yet; calibrate it before the first step."
            )
        with torch.autocast(tokens.device.type, enabled=False):
            centred = tokens.float() - self.mean
            if self.mode in ROTATING:
                centred = centred @ self.rotation.T
            return centred * self.scale


class FeatureStatistics:
    """Running mean and covariance of tokens, in float64 on the CPU.

    Args:
        dim: D; the covariance takes 8 D^2 bytes (82 MB at 3200).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, tokens: Tensor) -> None:
        """Add tokens `[..., D]`."""
        flat = tokens.detach().flatten(0, -2).cpu().double()
        self.count += flat.shape[0]
        self._sum += flat.sum(0)
        self._outer += flat.T @ flat

    def merge(self, count: int, total: Tensor, outer: Tensor) -> None:
        """Add another process's sums."""
        self.count += count
        self._sum += total
        self._outer += outer

    def sums(self) -> tuple[int, Tensor, Tensor]:
        """Return `(count, sum [D], sum of outer products [D, D])`, for `merge` elsewhere."""
        return self.count, self._sum, self._outer

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean `[D]` and covariance `[D, D]`, float64.

        Raises:
            ValueError: fewer than two tokens, or not all finite.
        """
        if self.count < 2:
            raise ValueError(f"Standardising needs at least 2 teacher tokens; {self.count} were seen.")
        mean = self._sum / self.count
        covariance = self._outer / self.count - torch.outer(mean, mean)
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("Features are not finite: the weights or the dtype of an encoder are unfit.")
        return mean, covariance


def nearest_directions(covariance: Tensor, dim: int, whitening: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a map of teacher tokens into the student's channels, and the variance a channel that it leaves.

    The teacher's principal directions, as many as the student has channels, turned by the rotation that brings them
    nearest to the student's tokens in the sense of least squares (Schoenemann, "A generalized solution of the
    orthogonal Procrustes problem", 1966). A teacher narrower than the student fills as many dimensions as it has.

    Args:
        covariance: `[D + S, D + S]`, of teacher tokens beside the student's.
        dim: D.
        whitening: power of its standard deviation that each direction is divided by, before the rotation.

    Returns:
        `[S, D]`, and a scalar: the mean variance over the directions kept.
    """
    kept = min(dim, covariance.shape[0] - dim)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance[:dim, :dim])
    variances, factors = eigenvalues[-kept:], whitening_factors(eigenvalues, whitening)[-kept:]
    directions = eigenvectors[:, -kept:] * factors
    left, _, right = torch.linalg.svd(directions.T @ covariance[:dim, dim:], full_matrices=False)
    return (directions @ left @ right).T, (variances * factors.square()).mean()


def equal_variances(covariance: Tensor, whitening: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a map `[D, D]` after which every channel has the same variance, and that variance, a scalar.

    Args:
        covariance: `[D, D]`.
        whitening: power of its standard deviation that each principal direction is divided by; at 0 the map is a
            rotation.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    eigenvalues = eigenvalues.clamp_min(0)
    factors = whitening_factors(eigenvalues, whitening)
    variances = eigenvalues * factors.square()
    return equalising_rotation(variances) @ (eigenvectors * factors).T, variances.mean()


def whitening_factors(eigenvalues: Tensor, whitening: float) -> Tensor:
    """Return what each principal direction is multiplied by, `[D]`.

    A direction without variance is multiplied by what one of mean variance is. It has none where there were fewer
    calibration tokens than channels; made large, it would outweigh all others in other images.

    Args:
        eigenvalues: `[D]`, the variances along the directions.
        whitening: power of the standard deviation that a direction is divided by.
    """
    mean = eigenvalues.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return eigenvalues.where(eigenvalues > VARIANCE_FLOOR * mean, mean).pow(-whitening / 2)


def equalising_rotation(eigenvalues: Tensor) -> Tensor:
    """Return an orthogonal R `[D, D]` for which R diag(eigenvalues) R^T has a constant diagonal.

    Each step rotates the plane of one channel below the mean and one above it, so that one of the two becomes exactly
    the mean: at most D - 1 Givens rotations (Bendel and Mickey, "Population correlation matrices for sampling
    experiments", 1978).

    Args:
        eigenvalues: `[D]`, not negative.
    """
    dim = eigenvalues.shape[0]
    matrix = torch.diag(eigenvalues.double())
    rotation = torch.eye(dim, dtype=torch.float64)
    target = float(eigenvalues.double().mean())
    for _ in range(dim - 1):
        diagonal = matrix.diagonal()
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        below, above = float(diagonal[low]) - target, float(diagonal[high]) - target
        if below >= 0 or above <= 0 or above - below <= 1e-12 * abs(target):
            break
        # Solve for t = tan(angle): (below + 2 t offset + t^2 above) = 0, the smaller root for accuracy.
        offset = float(matrix[low, high])
        root = (offset**2 - below * above) ** 0.5
        tangent = (-offset + root) / above if offset <= 0 else -below / (offset + root)
        cosine = (1 + tangent**2) ** -0.5
        sine = cosine * tangent
        plane = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
        pair = [low, high]
        matrix[pair] = plane @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ plane.T
        rotation[pair] = plane @ rotation[pair]
    return rotation
