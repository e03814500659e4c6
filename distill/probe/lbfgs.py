"""L-BFGS for a smooth convex function whose curvature is roughly known along each coordinate.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 7.4, with a diagonal of the caller's in place
of a multiple of the identity as the starting Hessian. The line search follows Hager and Zhang 2005 ("A new conjugate
gradient method with guaranteed descent and an efficient line search"), equation 4.1: where the decrease drowns in
rounding it is judged by slopes, which stay exact to many more digits. So single-precision evaluations can be driven
to small gradients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DECREASE = 1e-4  # sufficient decrease, and
_CURVATURE = 0.9  # strong curvature: Nocedal and Wright's constants for quasi-Newton methods
_APPROXIMATE = 0.8  # 1 - 2 * 0.1: Hager and Zhang's delta
_TRIALS = 25
_PATIENCE = 20  # iterations without a smaller gradient or value before rounding is taken to be all there is left


@dataclass(frozen=True)
class Point:
    """A function's value at some parameters.

    Attributes:
        parameters: float64.
        value: the function.
        gradient: of the shape of `parameters`, float64.
        largest: what the tolerance is held against.
    """

    parameters: Tensor
    value: float
    gradient: Tensor
    largest: float


class Memory:
    """The last steps and the changes of the gradient along them."""

    def __init__(self, size: int = 30) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=size)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Keep a pair, unless its curvature is lost in rounding."""
        s, y = step.flatten(), change.flatten()
        curvature = float(s.dot(y))
        if curvature > 1e-10 * float(s.norm() * y.norm()):
            self._pairs.append((s, y, curvature))

    def shift(self, extra: Tensor) -> None:
        """Correct the pairs for a function to which `sum(extra * parameters ** 2) / 2` has been added."""
        old = list(self._pairs)
        self._pairs.clear()
        for step, change, _ in old:
            self.add(step, change + extra.flatten() * step)

    def direction(self, gradient: Tensor, inverse_curvature: Tensor) -> Tensor:
        """Return the quasi-Newton step for a gradient (the two-loop recursion)."""
        step, inverse = gradient.flatten().clone(), inverse_curvature.flatten()
        weights: list[float] = []
        for s, y, curvature in reversed(self._pairs):
            weights.append(float(s.dot(step)) / curvature)
            step.sub_(y, alpha=weights[-1])
        step *= inverse
        if self._pairs:
            _, y, curvature = self._pairs[-1]
            step *= curvature / float((y * inverse).dot(y))
        for (s, y, curvature), weight in zip(self._pairs, reversed(weights), strict=True):
            step.add_(s, alpha=weight - float(y.dot(step)) / curvature)
        return step.neg_().view_as(gradient)


def minimise(
    evaluate: Callable[[Tensor], Point],
    start: Tensor,
    inverse_curvature: Tensor,
    memory: Memory,
    *,
    tolerance: float,
    max_iter: int,
    rounding: float,
    small_value: float = 0.0,
) -> Point:
    """Follow quasi-Newton steps from `start` until the gradient is small enough.

    Args:
        evaluate: the function.
        start: parameters, float64.
        inverse_curvature: above 0, of the shape of `start`: one over the diagonal of a rough Hessian.
        memory: steps of a neighbouring problem, or empty; it is filled.
        tolerance: on `Point.largest`; where the value has fallen below `small_value` it is lowered in proportion.
        small_value: below it the function is taken to approach zero, and its gradient with it; 0 for never.
        max_iter: limit on the steps.
        rounding: relative error of the function's values.

    Returns:
        The last point, or where rounding stopped the search the one with the smallest gradient.
    """
    point = best = evaluate(start)
    lowest, stalled = point.value, 0
    for _ in range(max_iter):
        if point.largest <= tolerance * (min(1.0, point.value / small_value) if small_value else 1.0):
            return point
        direction = memory.direction(point.gradient, inverse_curvature)
        found = _search(evaluate, point, direction, rounding)
        if found is None:
            break
        memory.add(found.parameters - point.parameters, found.gradient - point.gradient)
        point = found
        stalled += 1
        if point.value < lowest - rounding * abs(lowest):
            lowest, stalled = point.value, 0
        if point.largest < best.largest:
            best, stalled = point, 0
        if stalled >= _PATIENCE:
            break
    return point if point.value < best.value - rounding * abs(best.value) else best


def _search(evaluate: Callable[[Tensor], Point], origin: Point, direction: Tensor, rounding: float) -> Point | None:
    """Return a point along the direction that satisfies the (approximate) Wolfe conditions; None when there is none."""
    slope0 = float((origin.gradient * direction).sum())
    if not slope0 < 0:
        return None
    step, (low, low_slope), high = 1.0, (0.0, slope0), math.inf
    high_slope = math.nan
    for _ in range(_TRIALS):
        point = evaluate(origin.parameters + step * direction)
        slope = float((point.gradient * direction).sum())
        is_lower = point.value <= origin.value + _DECREASE * step * slope0
        is_near = point.value <= origin.value + rounding * abs(origin.value) and slope <= -_APPROXIMATE * slope0
        if (is_lower or is_near) and abs(slope) <= -_CURVATURE * slope0:
            return point
        if slope < 0 and (is_lower or is_near):
            low, low_slope = step, slope
        else:
            high, high_slope = step, slope
        step = _next_step(low, low_slope, high, high_slope)
    return None


def _next_step(low: float, low_slope: float, high: float, high_slope: float) -> float:
    """Where the slope, drawn as a line between the ends, is zero; kept inside the interval."""
    if math.isinf(high):
        return 4.0 * low
    width = high - low
    if not (math.isfinite(high_slope) and high_slope > 0):
        return low + 0.1 * width
    share = -low_slope / (high_slope - low_slope)
    return low + min(max(share, 0.1), 0.9) * width


def largest_entry(*gradients: Tensor) -> float:
    """Return the largest absolute entry over all tensors."""
    return max(float(torch.linalg.vector_norm(gradient, math.inf)) for gradient in gradients)
