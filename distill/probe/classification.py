"""What every classification protocol takes and gives: checked inputs, test predictions and class probabilities.

Legend: N images, D the width of a feature, T patch tokens an image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import DataError
from distill.probe.protocol import Split


@dataclass(frozen=True)
class Classified:
    """What a protocol says of the test split, in the order of the split's test part.

    Attributes:
        predictions: `[n_test]`, int64.
        probabilities: `[n_test, K]`, float32; the rows sum to 1.
    """

    predictions: Tensor
    probabilities: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen on the selection split, as plain values for JSON."""
        return {}


def positions_of(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fit, select and test positions as int64 tensors."""
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    return fit, select, test


def require_classifiable(features: Tensor, targets: Tensor, split: Split, num_classes: int) -> None:
    """Check that a classifier can be fitted, selected and tested on these images.

    Args:
        features: `[N, ...]`, floating point.
        targets: `[N]`, int64 classes.
        split: positions among the `N` images.
        num_classes: number of classes.

    Raises:
        DataError: features and targets differ in number, there are fewer than two classes, a part is empty, an image
            has no label or one that is out of range, a class has no image to learn from, or a feature is not finite.
    """
    if len(features) != len(targets):
        raise DataError(f"There are features of {len(features)} images and targets of {len(targets)}; they must match.")
    if num_classes < 2:
        raise DataError(
            f"A classification probe needs two classes or more and was given {num_classes}. Add images of another "
            "class, or leave labels out to measure fidelity alone."
        )
    parts = dict(zip(("fit", "select", "test"), positions_of(split), strict=True))
    for name, positions in parts.items():
        if len(positions) == 0:
            raise DataError(f"The {name} split is empty; fit, select and test need labelled images each. Add images.")
        _require_labels(targets[positions], name, num_classes)
        _require_finite(features, positions, name)
    counts = torch.bincount(targets[parts["fit"]], minlength=num_classes)
    absent = (counts == 0).nonzero().flatten().tolist()
    if absent:
        raise DataError(
            f"The fit split has no image of {len(absent)} of {num_classes} classes, first class {absent[0]}; a "
            "classifier cannot learn a class that it never sees. Add images of it, or take the class out."
        )


def _require_labels(targets: Tensor, name: str, num_classes: int) -> None:
    missing = int((targets < 0).sum())
    if missing:
        raise DataError(
            f"{missing} of {len(targets)} images of the {name} split have no label; classification takes labelled "
            "images only. Label them, or restrict the split to the labelled ones."
        )
    if int(targets.max()) >= num_classes:
        raise DataError(
            f"The {name} split has the class {int(targets.max())}, but there are {num_classes} classes, numbered "
            "from 0. Build the index again."
        )


def _require_finite(features: Tensor, positions: Tensor, name: str) -> None:
    finite = torch.cat([features[part].flatten(1).isfinite().all(1) for part in positions.split(1024)])
    if not finite.all():
        first = int(positions[~finite][0])
        raise DataError(
            f"Features of {int((~finite).sum())} images of the {name} split are not finite, first image {first}. A "
            "probe of NaN or infinity means nothing: check the weights, or extract with --precision float32."
        )


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Return the share of predictions `[n]` that equal the targets `[n]`, for choosing between settings."""
    return float((predictions == targets).double().mean())


def best_setting(scores: Mapping[Any, tuple[float, float]]) -> Any:
    """Return the key with the highest (accuracy, -loss); a full tie goes to the key that was added first."""
    return max(scores, key=scores.__getitem__)
