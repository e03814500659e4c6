"""A recipe from several YAML files and flags: mappings merge key by key, later ones win, and null takes a key away."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from distill.errors import ConfigError

RECIPE_WORDS = (
    *("--config", "--run_dir", "--seed", "--template", "--image_token", "--max_new_tokens", "--noise_features"),
    *("--vision.", "--connector.", "--language.", "--tiling.", "--stages.", "--trainer."),
)
"""How flags of a recipe begin; everything else on the command line is the verb's own."""


def gather_recipe_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with each flag of the recipe, and its value, in the JSON list `--recipe`.

    jsonargparse knows only the flags of the verb's function; a recipe's travel in this list. Words that do not begin
    with `fit`, the one verb that reads a recipe, are returned as they are.
    """
    if words[:1] != ["fit"]:
        return list(words)
    own: list[str] = []
    gathered: list[str] = []
    rest = iter(words)
    for word in rest:
        if is_recipe_word(word):
            gathered.append(_joined(word, rest))
        else:
            own.append(word)
    return [*own, f"--recipe={json.dumps(gathered)}"] if gathered else own


def is_recipe_word(word: str) -> bool:
    """Whether a word of the command line is a flag of a recipe."""
    name = word.partition("=")[0]
    return any(name.startswith(flag) if flag.endswith(".") else name == flag for flag in RECIPE_WORDS)


def _joined(word: str, rest: Iterator[str]) -> str:
    return word if "=" in word else f"{word}={next(rest, '')}"


def merge_words(words: Sequence[str]) -> dict[str, Any]:
    """Return the mapping that `--config=FILE` and `--key.key=VALUE` make together; files first, flags win.

    Raises:
        ConfigError: no file is named, a file cannot be read or is no mapping, or a flag has no value.
    """
    files = [Path(word.partition("=")[2]) for word in words if word.startswith("--config=")]
    if not files:
        raise ConfigError("No recipe is named; give --config FILE, for example configs/vlm/mini_internvl.yaml.")
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, read_yaml(file))
    return apply_flags(merged, [word for word in words if not word.startswith("--config=")])


def apply_flags(recipe: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Return a recipe with `--key.key=VALUE` flags applied, each value read as YAML.

    Raises:
        ConfigError: a flag has no value, or its value is no YAML.
    """
    merged = dict(recipe)
    for flag in flags:
        path, sign, text = flag.removeprefix("--").partition("=")
        if not sign or not text.strip():
            raise ConfigError(f"The flag --{path} has no value; write --{path}=VALUE.")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"The flag {flag} cannot be read as YAML: {error}") from error
        for key in reversed(path.split(".")):
            value = {key: value}
        merged = merge(merged, value)
    return merged


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, no valid YAML, or holds something else.
    """
    try:
        loaded: object = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The recipe {file} cannot be read ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds no mapping of keys to values; see configs/vlm for how a recipe looks.")
    return cast(dict[str, Any], loaded)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on it: mappings key by key, anything else replaced.

    A null in `over` takes away a mapping of `base`, such as a stage; for any other key it is the value null.
    """
    merged = dict(base)
    for key, value in over.items():
        present = merged.get(key)
        if isinstance(present, dict) and value is None:
            del merged[key]
        elif isinstance(present, dict) and isinstance(value, dict):
            merged[key] = merge(cast(dict[str, Any], present), cast(dict[str, Any], value))
        else:
            merged[key] = value
    return merged
