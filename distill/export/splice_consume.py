"""The fresh process of `--into`: loads a whole VLM as its users do and says what its tower computes.

Run as `python -m distill.export.splice_consume KIND DIRECTORY REQUEST RESPONSE`. OpenGVLab's layout is loaded by the
directory's own code, from which only the tower is taken: the language model has no part in its features.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.export.contract import ConsumerFeatures
from distill.export.internvl import temporary_module_cache
from distill.export.splice_vlm import CHAT, read_vlm, tower_dtype
from distill.export.transformers_loading import hidden_states, load_strictly

_TOWER_CLASS = "modeling_intern_vit.InternVisionModel"


def main(arguments: list[str]) -> None:
    """Read REQUEST (`pixel_values`, `num_layers`), run the tower in float32, write RESPONSE.

    Args:
        arguments: kind of VLM, its directory, request file, response file.
    """
    kind, directory = arguments[0], Path(arguments[1])
    request = load_file(arguments[2])
    model, missing, unexpected = _chat_tower(directory) if kind == CHAT else _transformers_tower(directory)
    # The stored precision is exact in float32, so that only the weights' own rounding remains.
    features = hidden_states(model.float(), missing, unexpected, request["pixel_values"], int(request["num_layers"]))
    save_file(_answer(features), arguments[3], metadata={"report": json.dumps(_report(features))})


def _answer(features: ConsumerFeatures) -> dict[str, torch.Tensor]:
    return {
        f"tower.{position}.{name}": tensor.contiguous()
        for position, layer in enumerate(features.layers)
        for name, tensor in zip(("prefix", "patches"), layer, strict=True)
    }


def _report(features: ConsumerFeatures) -> dict[str, Any]:
    return {"missing": features.missing, "unexpected": features.unexpected, "consumer": features.consumer}


def _transformers_tower(directory: Path) -> tuple[Any, list[str], list[str]]:
    """Load the whole VLM by the class its config.json names, in the precision of its files."""
    import transformers

    vlm = read_vlm(directory)
    model_class = getattr(transformers, vlm.config["architectures"][0])
    model, missing, unexpected = load_strictly(model_class, directory, dtype=tower_dtype(vlm))
    # What else a release of transformers renames in a language model was so before.
    missing, unexpected = ([key for key in keys if "vision_tower" in key] for keys in (missing, unexpected))
    return model.model.vision_tower, missing, unexpected


def _chat_tower(directory: Path) -> tuple[Any, list[str], list[str]]:
    """Build the tower by the directory's own class and configuration, and load its tensors out of the whole model."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with temporary_module_cache():
        model_class: Any = get_class_from_dynamic_module(_TOWER_CLASS, directory)
    vlm = read_vlm(directory)
    # flash-attn, where it is installed, computes on a GPU and in half precision only.
    model = model_class(model_class.config_class(**{**vlm.vision_config, "use_flash_attn": False}))
    state: dict[str, torch.Tensor] = {}
    for name in sorted({vlm.tensors[key].file for key in vlm.tower_keys}):
        with safe_open(directory / name, framework="pt") as file:
            for key in vlm.tower_keys:
                if vlm.tensors[key].file == name:
                    state[key.removeprefix(vlm.tower_prefix)] = file.get_tensor(key)
    info = model.load_state_dict(state, strict=False)
    return model.eval(), sorted(info.missing_keys), sorted(info.unexpected_keys)


if __name__ == "__main__":
    main(sys.argv[1:])
