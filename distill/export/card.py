"""The model card (README.md) and the manifest (manifest.json) of an export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from distill import __version__
from distill.encoder import TimmLayoutEncoder
from distill.export.contract import ExportTarget
from distill.export.files import MANIFEST_FILE, sha256, write_json, write_text
from distill.export.golden import NUM_LAYERS
from distill.export.provenance import UNKNOWN_LICENCE, Provenance
from distill.export.verify import Verification

CARD_FILE = "README.md"
MANIFEST_VERSION = "distill-export/1"

_LIBRARIES = {"internvl-hf": "transformers", "clip-hf": "transformers", "timm": "timm"}


def write_manifest(
    directory: Path,
    encoder: TimmLayoutEncoder,
    target: ExportTarget,
    provenance: Provenance,
    verification: Verification,
) -> None:
    """Write manifest.json: what the export is, how to feed and read it, what was proved, and every file's hash."""
    count = min(NUM_LAYERS, encoder.depth)
    manifest: dict[str, Any] = {
        "format": MANIFEST_VERSION,
        "target": target.FORMAT,
        "student": provenance.student,
        "which": provenance.which,
        "architecture": {
            "layout": encoder.layout,
            "timm_architecture": encoder.timm_architecture,
            "timm_model_args": encoder.timm_model_args,
            "embed_dim": encoder.embed_dim,
            "depth": encoder.depth,
            "patch_size": encoder.patch_size,
            "num_prefix_tokens": encoder.num_prefix_tokens,
        },
        "preprocessing": {
            "img_size": encoder.img_size,
            "resize": "squash",
            "interpolation": "bicubic",
            "image_mean": list(encoder.image_mean),
            "image_std": list(encoder.image_std),
        },
        "features": {"select_layer": -1, "norm_after": False, "position_embedding_resized_by_export": False},
        "verification": {"layers": list(range(-count, 0)), **asdict(verification)},
        "sources": [asdict(source) for source in provenance.sources],
        "recipe": provenance.recipe,
        "metrics": provenance.metrics,
        "versions": {"encoder-distill": __version__, "torch": torch.__version__},
        # Not the card: people edit it, and model hubs ask them to.
        "files": {
            path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(directory.iterdir())
            if path.name != CARD_FILE
        },
    }
    write_json(directory / MANIFEST_FILE, manifest)


def write_card(
    directory: Path,
    encoder: TimmLayoutEncoder,
    target: ExportTarget,
    provenance: Provenance,
    verification: Verification,
) -> None:
    """Write README.md, the card that model hubs show."""
    sections = [
        _front_matter(target, provenance),
        _summary(encoder, target, provenance),
        f'## Loading\n\n```python\ndirectory = "."  # this directory\n\n{target.loading_code()}```\n',
        _reading(encoder, target),
        _metrics(provenance),
        _proof(directory, verification),
        _licences(provenance),
        _recipe(provenance),
    ]
    write_text(directory / CARD_FILE, "\n".join(section for section in sections if section))


def _front_matter(target: ExportTarget, provenance: Provenance) -> str:
    front = {
        "license": "other",
        "license_name": "of-the-sources-named-below",
        "library_name": _LIBRARIES[target.FORMAT],
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision-encoder", "knowledge-distillation", "vlm"],
    }
    title = f"{provenance.student}, {'distilled' if provenance.which == 'last' else 'before distillation'}"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n"


def _summary(encoder: TimmLayoutEncoder, target: ExportTarget, provenance: Provenance) -> str:
    teachers = [source.description for source in provenance.sources if source.role.startswith("teacher")]
    origin = f", distilled from {' and '.join(f'`{teacher}`' for teacher in teachers)}" if teachers else ""
    grid = encoder.img_size // encoder.patch_size
    return (
        f"A vision encoder of {encoder.layout} layout (timm `{encoder.timm_architecture}`){origin}, in the format "
        f"`{target.FORMAT}`. It has {encoder.depth} layers of width {encoder.embed_dim} and turns an image of "
        f"{encoder.img_size} x {encoder.img_size} px into a {grid} x {grid} grid of patch tokens with "
        f"{encoder.num_prefix_tokens} token(s) in front.\n"
    )


def _reading(encoder: TimmLayoutEncoder, target: ExportTarget) -> str:
    lines = [
        f"- **Preprocessing**: RGB, squashed to {encoder.img_size} x {encoder.img_size} px by bicubic resampling (no "
        f"crop, no padding), scaled to [0, 1], mean {list(encoder.image_mean)}, std {list(encoder.image_std)}. The "
        "config in this directory does exactly this.",
        "- **Layer to read**: the last one before any final norm, `select_layer = -1`.",
        "- **Positions** are for this image size; another size is resized by each library with its own filter.",
    ]
    if target.FORMAT == "clip-hf":
        lines.insert(
            2,
            "  LLaVA-like programs read -2 by default: set `vision_feature_layer=-1`. `pooler_output` was not trained.",
        )
    if target.FORMAT == "internvl-hf":
        lines.insert(
            2, "  In `InternVLForConditionalGeneration` it is the default; `pooler_output` is empty: pool yourself."
        )
    return "## Reading it\n\n" + "\n".join(lines) + "\n"


def _metrics(provenance: Provenance) -> str:
    if not provenance.metrics:
        return ""
    rows = ["| domain | cosine before | cosine | of a constant | skill |", "| --- | --- | --- | --- | --- |"]
    for domain, values in provenance.metrics.items():
        cells = [values.get(key) for key in ("initial_cosine", "cosine", "baseline", "skill")]
        rows.append(f"| {domain} | " + " | ".join("" if value is None else f"{value:.4f}" for value in cells) + " |")
    note = (
        "Validation of its run: cosine between the student's tokens, after the projection head (which is not part of "
        "this export), and the teacher's, mean over the aligned layers. *Of a constant* is what the best constant "
        "vector reaches; *skill* is 0 for it and 1 for the teacher itself."
    )
    return "## Fidelity to the teacher, by domain\n\n" + "\n".join(rows) + f"\n\n{note}\n"


def _proof(directory: Path, verification: Verification) -> str:
    hashes = [f"- `{path.name}` sha256 `{sha256(path)}`" for path in sorted(directory.glob("*.safetensors"))]
    return (
        "## Verified\n\n"
        f"Before it was published, `{verification.consumer}` loaded this directory in a fresh process with no missing "
        f"and no unexpected weight and gave the encoder's own features of one fixed image (golden.safetensors): the "
        f"worst difference was {verification.worst_difference:.1e} in float32, allowed is "
        f"{verification.tolerance:.1e}.\n\n" + "\n".join(hashes) + "\n"
    )


def _licences(provenance: Provenance) -> str:
    rows = [f"| {source.role} | `{source.description}` | {source.licence} |" for source in provenance.sources]
    unknown = any(source.licence == UNKNOWN_LICENCE for source in provenance.sources) or not rows
    table = "\n".join(["| what | which | licence |", "| --- | --- | --- |", *rows]) + "\n\n" if rows else ""
    advice = (
        "Where the licence is not recorded, check it before you publish or sell this encoder. "
        if unknown
        else "These are what the files beside the weights declare. "
    )
    return f"## Licences\n\n{table}{advice}The training data have licences of their own.\n"


def _recipe(provenance: Provenance) -> str:
    if not provenance.recipe:
        return ""
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(provenance.recipe, sort_keys=False)}```\n"
