"""Words of a command line that belong to a recipe, for verbs that read one and have options of their own.

`distill plan CONFIG --trainer.devices 1 --accelerator h200` has the recipe's flags as `distill fit` takes them, and the
verb's. jsonargparse knows only those of the verb's function, so the recipe's travel in a list, under `--overrides`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

_PREFIXES = ("--trainer.", "--model.", "--data.", "--seed_everything", "--config")


def gather_overrides(words: Iterable[str], recipe_flag: str = "") -> list[str]:
    """Return the words with each flag of the recipe, and its value, as one item of the JSON list `--overrides`.

    The recipe's file is the first word, or where there is none, the first `--config FILE`.

    Args:
        words: what follows the verb.
        recipe_flag: what is put before the recipe's file, where it is no positional argument of the verb's function.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith(_PREFIXES):
            overrides.append(_joined(word, rest))
        else:
            own.append(word)
    first = next((item for item in overrides if item.startswith("--config=")), None)
    if own and not own[0].startswith("-"):
        own[0] = f"{recipe_flag}{own[0]}"
    elif first is not None:
        overrides.remove(first)
        own.insert(0, recipe_flag + first.partition("=")[2])
    return [*own, f"--overrides={json.dumps(overrides)}"] if overrides else own


def _joined(word: str, rest: Iterator[str]) -> str:
    return word if "=" in word else f"{word}={next(rest, '')}"
