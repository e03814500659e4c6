"""Whether an encoder changed on export still computes what its source computes.

Targets are verified against the changed encoder; here it is compared with the student itself.
"""

from __future__ import annotations

import torch

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.compare import allowed_difference
from distill.export.golden import draw_image

RESHAPE_TOLERANCE = 1e-4
"""Largest absolute difference of a feature below 10.5: folded weights and another code path round differently."""


def check_same_features(source: TimmLayoutEncoder, changed: TimmLayoutEncoder) -> None:
    """Return when both give the same hidden states of the golden image, at the changed encoder's size.

    Args:
        source: before the changes; its first hidden states count.
        changed: after them, with as many blocks or fewer.

    Raises:
        ExportError: a hidden state differs, or the source cannot compute that size.
    """
    image = torch.from_numpy(draw_image(changed.img_size, changed.img_size)).permute(2, 0, 1).unsqueeze(0)
    try:
        with torch.inference_mode():
            expected = source.forward_hidden_states(image, source.depth)[: changed.depth]
            got = changed.forward_hidden_states(image, changed.depth)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ExportError(
            f"The student cannot compute a {changed.img_size} px image, so what --img_size makes of it cannot be "
            f"checked: {error}. Leave --img_size out."
        ) from error
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True), start=1):
        _check_layer(mine, theirs, number)


def _check_layer(got: Layer, expected: Layer, number: int) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        if mine.shape != theirs.shape:
            raise ExportError(
                f"Block {number} gives {tuple(mine.shape)} after the changes, {tuple(theirs.shape)} before."
            )
        if not theirs.numel():
            continue
        difference, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
        allowed = allowed_difference(RESHAPE_TOLERANCE, largest)
        if not difference <= allowed:  # a NaN is too far as well
            raise ExportError(
                f"After --layers, --img_size or --fold_layer_scale, block {number} differs from the student's by "
                f"{difference:.1e}; {allowed:.1e} is allowed. Export it without these flags."
            )
