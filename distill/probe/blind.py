"""What a guess scores that never looks at the image: the figure that an encoder must pass to have shown anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from distill.probe.intervals import FloatArray
from distill.probe.protocol import IntArray

MAX_GUESSES, MAX_TRIED_ON = 16, 100
"""Edit distances are slow: so many learnt lines are candidates, and so many say which is best."""


def commonest_class_accuracy(targets: IntArray, fit: IntArray, test: IntArray) -> float:
    """Return the accuracy, in [0, 1], of always answering the class that is commonest where one learns.

    Args:
        targets: `[N]`, the class of each image, none negative at the two parts' positions.
        fit: positions that are learnt from.
        test: positions that are scored.
    """
    commonest = int(np.bincount(targets[fit]).argmax())
    return float((targets[test] == commonest).mean())


def constant_text_error(
    fit: Sequence[str], test: Sequence[str], edits: Callable[[list[str], list[str]], FloatArray]
) -> float:
    """Return the character error rate of always writing one text, the best one for the lines that are learnt from.

    Tried are nothing at all, the commonest character so many times, and some of the lines themselves.

    Args:
        fit: lines that are learnt from.
        test: lines that are scored.
        edits: the fewest edits between predictions and texts, `[n]`.
    """
    commonest = Counter("".join(fit)).most_common(1)[0][0]
    longest = max(map(len, fit))
    guesses = ["", *(commonest * length for length in range(1, min(longest, MAX_GUESSES) + 1)), *fit[:MAX_GUESSES]]
    tried_on = list(fit[:MAX_TRIED_ON])
    best = min(dict.fromkeys(guesses), key=lambda guess: float(edits([guess] * len(tried_on), tried_on).sum()))
    return float(edits([best] * len(test), list(test)).sum()) / sum(map(len, test))
