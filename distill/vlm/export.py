"""A finished run's trained parts as files that need nothing of this project: LoRA merged, transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from safetensors.torch import save_file

from distill.errors import ConfigError
from distill.export.files import staged
from distill.export.run import as_timm_layout, export_encoder
from distill.vlm.build import BuiltVLM, load_trained
from distill.vlm.language import merge_lora
from distill.vlm.parameters import count_parameters
from distill.vlm.runs import VLMRun
from distill.vlm.vision import select_layer

EXPORT_FORMAT = "distill-vlm-export/1"
MANIFEST_NAME = "vlm.json"
VISION_FORMAT = "timm"


def export_vlm(path: Path, out: Path, console: Console) -> Path:
    """Write the parts of a finished run to a new folder, and return that.

    language/ is a directory of transformers with its tokenizer, LoRA's updates added to the weights; it may be another
    recipe's `language.path`. connector.safetensors has the connector; vision/ is there where the encoder was trained,
    an export in timm's format. vlm.json says how they were joined.

    Raises:
        ConfigError: the run is not finished, or its language model has norms that transformers' does not.
        ExportError: the folder is there already or cannot be written, or the encoder cannot be exported.
        WeightsError: weights are missing, damaged or do not fit.
    """
    run = VLMRun(path)
    if run.recipe().language.post_norm:
        raise ConfigError(
            f"{path} cannot be exported: language.post_norm puts norms into Phi that transformers' Phi does not have, "
            "so nothing else could load it. Use the run itself, or train without post_norm."
        )
    with console.status("loading the model"):
        built = load_trained(run)
    with staged(out.resolve(), overwrite=False) as folder:
        facts = _facts(built, path)
        language = cast(Any, merge_lora(built.model.language))
        language.save_pretrained(str(folder / "language"))
        built.tokenizer.save_pretrained(str(folder / "language"))
        connector = {key: value.contiguous() for key, value in built.model.connector.state_dict().items()}
        save_file(connector, folder / "connector.safetensors")
        if facts["vision"]["trained"]:
            encoder = as_timm_layout(built.model.vision.requires_grad_(False))
            export_encoder(encoder, VISION_FORMAT, folder / "vision")
        (folder / MANIFEST_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    console.print(f"Written: {out}", highlight=False, markup=False, soft_wrap=True)
    return out


def _facts(built: BuiltVLM, path: Path) -> dict[str, Any]:
    """Return what joins the parts: widths follow from the weights, the rest stands here."""
    recipe, prompts = built.recipe, built.prompt_builder()
    counts = count_parameters(built.model)
    trained = any("vision" in stage.rates for stage in recipe.stages.values())
    return {
        "format": EXPORT_FORMAT,
        "run": str(path),
        "vision": {"path": str(recipe.vision.path), "layer": select_layer(recipe.vision), "trained": trained},
        "connector": {"name": recipe.connector.name, **recipe.connector.options},
        "language": {"path": str(recipe.language.path), "lora_merged": recipe.language.tune == "lora"},
        "template": recipe.template,
        "image_token": prompts.image_token,
        "image_token_id": prompts.image_token_id,
        "tokens_per_tile": prompts.tokens_per_tile,
        "tile_size_px": prompts.tiling.tile_size,
        "max_tiles": prompts.tiling.max_tiles,
        "parameters": {"vision": counts.vision, "connector": counts.connector, "language": counts.language},
    }
