"""What open_clip knows of a model without its weights: architecture, pretrained tags, and normalisation."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, cast

from teachers.frozen import WEIGHTS_PRETRAINED
from teachers.sources import LOCAL_DIR_PREFIX

CONFIG_NAME = "open_clip_config.json"


def read_model_config(model_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(model_cfg, preprocess_cfg)`; the second is empty for names that open_clip ships.

    Args:
        model_name: a name of `open_clip.list_models()`, or `local-dir:<directory>`.

    Raises:
        ValueError: no such model, or the directory's config has no `model_cfg` with a `vision_cfg`.
    """
    if not model_name.startswith(LOCAL_DIR_PREFIX):
        return _shipped_config(model_name), {}
    path = Path(model_name.removeprefix(LOCAL_DIR_PREFIX)) / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model, preprocess = dict(config["model_cfg"]), dict(config.get("preprocess_cfg") or {})
        model["vision_cfg"] = dict(model["vision_cfg"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no open_clip config with model_cfg and vision_cfg ({error!r}).") from error
    return model, preprocess


def _shipped_config(model_name: str) -> dict[str, Any]:
    import open_clip

    config = cast("dict[str, Any] | None", open_clip.get_model_config(model_name))
    if config is None:
        names = open_clip.list_models()
        near = difflib.get_close_matches(model_name, names, n=5, cutoff=0.4)
        raise ValueError(
            f"model_name {model_name!r} is no open_clip model; near it are {', '.join(near) or 'none'}. "
            "open_clip.list_models() lists all."
        )
    return config


def pretrained_tag(model_name: str, weights: str) -> str | None:
    """Return the tag that `weights` asks for, or None if it is no download.

    Args:
        model_name: a name that open_clip ships.
        weights: `pretrained:<tag>`, `pretrained` for the only tag of a model, or anything else.

    Raises:
        ValueError: the tag does not exist, or is not said although there are several.
    """
    word, _, tag = weights.partition(":")
    if word != WEIGHTS_PRETRAINED:
        return None
    import open_clip

    tags = cast("list[str]", open_clip.list_pretrained_tags_by_model(model_name))
    if not tag and len(tags) == 1:
        return tags[0]
    if tag not in tags:
        raise ValueError(
            f"weights {weights!r}: model {model_name!r} has the tags {', '.join(tags) or '(none)'}; "
            f"write {WEIGHTS_PRETRAINED}:<tag>."
        )
    return tag


def check_activation(model_name: str, tag: str, config: dict[str, Any]) -> None:
    """Refuse a tag that was trained with the other GELU: its weights load, and compute something else.

    Raises:
        ValueError: the model is built with GELU and the tag wants QuickGELU, or the reverse.
    """
    from open_clip.pretrained import get_pretrained_cfg

    if "timm_model_name" in config["vision_cfg"]:
        return
    trained_with = bool(get_pretrained_cfg(model_name, tag).get("quick_gelu", False))
    built_with = bool(config.get("quick_gelu", False))
    if trained_with != built_with:
        other = model_name.removesuffix("-quickgelu") if built_with else f"{model_name}-quickgelu"
        raise ValueError(
            f"model_name {model_name!r} has quick_gelu {built_with}, but tag {tag!r} was trained with quick_gelu "
            f"{trained_with}; use model_name {other!r}."
        )


def recorded_normalisation(model_name: str, tag: str | None) -> dict[str, Any]:
    """Return `mean` and `std` as open_clip records them for a tag, or for every tag of a model if they agree.

    Args:
        model_name: a name that open_clip ships.
        tag: None for weights from a file, of which nothing is recorded.

    Raises:
        ValueError: without a tag, and the tags of this model differ.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    default = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    tags = [tag] if tag else cast("list[str]", open_clip.list_pretrained_tags_by_model(model_name))
    found: list[dict[str, Any]] = []
    for name in tags:
        config = get_pretrained_cfg(model_name, name)
        recorded = {key: tuple(config.get(key) or default[key]) for key in default}
        if recorded not in found:
            found.append(recorded)
    if len(found) > 1:
        choices = "; ".join(f"mean {list(r['mean'])} std {list(r['std'])}" for r in found)
        raise ValueError(
            f"the checkpoints of {model_name!r} were trained with different normalisations ({choices}); set image_mean "
            "and image_std to those of yours."
        )
    return found[0] if found else default
