"""The model card (README.md) and the manifest (manifest.json) of an export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from distill import __version__
from distill.encoder import TimmLayoutEncoder
from distill.export.contract import ExportTarget, companion_flag, reading_of
from distill.export.files import MANIFEST_FILE, sha256, write_json, write_text
from distill.export.libmtmd import TESTED_VERSION
from distill.export.mmproj import TESTED_KEY
from distill.export.provenance import UNKNOWN_LICENCE, Provenance, Source
from distill.export.reshape import POSITION_METHOD, ReshapedEncoder
from distill.export.verify import Verification

CARD_FILE = "README.md"
MANIFEST_VERSION = "distill-export/2"
"""Name and version of manifest.json's schema; the number grows when a key changes its meaning or goes away."""

GIVEN_LICENCE = "terms of the directory given"
"""Licence of a text tower or projector: whoever exports knows where it came from, the run does not."""

_LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "onnx": "onnx", "gguf": "gguf", "executorch": "executorch"}
_TRANSFORMERS_FORMATS = ("internvl", "internvl-hf", "dinov2-hf", "clip-hf")

_READING_NOTES = {
    "clip-hf": "LLaVA-like programs read -2 by default: set `vision_feature_layer=-1`. `pooler_output` was not "
    "trained. MobileVLM and LLaVA's `anyres` read `size['shortest_edge']`, which the squash of this directory's "
    "preprocessing does not have: they stop there.",
    "internvl-hf": "In `InternVLForConditionalGeneration` it is the default; `pooler_output` is empty: pool yourself. "
    "transformers 4.57 cannot give its `output_hidden_states`: read `last_hidden_state`.",
    "gguf": "The file holds the projector as well, so llama.cpp gives projected features of this layer. Tested is "
    f"llama-cpp-python {TESTED_VERSION} (GGUF key `{TESTED_KEY}`). Another llama.cpp may read the class token's "
    "position from another row (an upstream change is open, issue 25814) and gives wrong features without an error. "
    "To check one, compare its features with golden.safetensors: `distill.export.verify.verify_export(directory)`.",
    "dinov2-hf": "`last_hidden_state` has one more norm: read `hidden_states[-1]`.",
    "open_clip": "`encode_image` reads the class token after one more norm and a projection; only the original CLIP "
    "was trained for that, so judge zero-shot accuracy before you rely on it.",
}


def write_manifest(
    directory: Path,
    encoder: TimmLayoutEncoder,
    target: ExportTarget,
    provenance: Provenance,
    verification: Verification,
) -> None:
    """Write manifest.json: what the export is, how to feed and read it, what was proved, and every file's hash."""
    count = min(len(target.LAYERS), encoder.depth)
    proof = {**asdict(verification), "worst_difference": verification.worst_difference}
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
        "features": {**_features(encoder, target), "trained_layers": trained_layers(encoder, provenance)},
        "verification": {"layers": list(range(-count, 0)), **proof},
        "sources": [asdict(source) for source in _sources(target, provenance)],
        "recipe": provenance.recipe,
        "metrics": provenance.metrics,
        "versions": {"encoder-distill": __version__, "torch": torch.__version__},
        "files": {
            path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in _published_files(directory)
        },
    }
    write_json(directory / MANIFEST_FILE, manifest)


def _published_files(directory: Path) -> list[Path]:
    """Return every file but the card: people edit it, and model hubs ask them to."""
    return [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != CARD_FILE]


def trained_layers(encoder: TimmLayoutEncoder, provenance: Provenance) -> list[int] | None:
    """Return the layers of this encoder that were trained, as -1, -2, ... from the end; None if unknown."""
    if provenance.trained_layers is None:
        return None
    cut = encoder.original_depth - encoder.depth if isinstance(encoder, ReshapedEncoder) else 0
    return list(range(-1, -min(provenance.trained_layers - cut, encoder.depth) - 1, -1))


def _features(encoder: TimmLayoutEncoder, target: ExportTarget) -> dict[str, Any]:
    """Return how the features are read, and what the export changed about them."""
    changed = encoder if isinstance(encoder, ReshapedEncoder) else None
    resized = changed is not None and changed.changes.img_size is not None
    return {
        "select_layer": -1,
        "has_cls": encoder.num_prefix_tokens > 0,
        "cls_in_output": encoder.num_prefix_tokens > 0 and reading_of(target).cls_in_output,
        "norm_after": False,
        "position_embedding_resized_by_export": resized,
        "position_embedding_method": POSITION_METHOD if resized else None,
        "position_embedding_from_img_size": changed.original_img_size if changed and resized else None,
        "layers_of_the_student": changed.original_depth if changed else encoder.depth,
        "layers_kept": encoder.depth,
        "layer_scale_folded": changed is not None and changed.changes.fold_layer_scale,
    }


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
        _loading(target),
        _reading(encoder, target, provenance),
        _metrics(provenance),
        _proof(directory, target, verification),
        _licences(_sources(target, provenance)),
        _recipe(provenance),
    ]
    write_text(directory / CARD_FILE, "\n".join(section for section in sections if section))


def _loading(target: ExportTarget) -> str:
    code = f'## Loading\n\n```python\ndirectory = "/path/to/export"\n\n{target.loading_code()}```\n'
    if target.FORMAT not in _TRANSFORMERS_FORMATS:
        return code
    return f"{code}\ntransformers 4.37 takes neither `.` nor a directory with a dot in its name.\n"


def _front_matter(target: ExportTarget, provenance: Provenance) -> str:
    front = {
        "license": "other",
        "license_name": "of-the-sources-named-below",
        "library_name": "transformers"
        if target.FORMAT in _TRANSFORMERS_FORMATS
        else _LIBRARIES.get(target.FORMAT, "pytorch"),
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
        f"{encoder.img_size} x {encoder.img_size} px into a {grid} x {grid} grid of patch tokens and "
        f"{encoder.num_prefix_tokens} prefix token(s).\n"
    )


def _reading(encoder: TimmLayoutEncoder, target: ExportTarget, provenance: Provenance) -> str:
    features, trained = _features(encoder, target), trained_layers(encoder, provenance)
    reading = reading_of(target)
    lines = [
        f"- **Preprocessing**: RGB, squashed to {encoder.img_size} x {encoder.img_size} px by bicubic resampling (no "
        f"crop, no padding), scaled to [0, 1], mean {list(encoder.image_mean)}, std {list(encoder.image_std)}. "
        f"{reading.preprocessing}",
        "- **Layer to read**: the last one before any final norm, `select_layer = -1`.",
    ]
    if trained is not None:
        named = ", ".join(map(str, trained)) or "none of those kept"
        lines.append(f"  Trained to be like the teacher's: {named}. Another layer may be read, but was not trained.")
    if target.FORMAT in _READING_NOTES:
        lines.append(f"  {_READING_NOTES[target.FORMAT]}")
    if features["has_cls"]:
        lines.append(f"- **Class token**: {reading.class_token.format(count=encoder.num_prefix_tokens)}")
    lines.append(_positions(encoder, features))
    if features["layers_kept"] != features["layers_of_the_student"]:
        lines.append(
            f"- **Depth**: the first {features['layers_kept']} of the student's {features['layers_of_the_student']} "
            "layers; the last one here is what a reader of an earlier layer of the student gets."
        )
    if features["layer_scale_folded"]:
        lines.append("- **LayerScale** is folded into the weights in front of it; where a file holds it, it is ones.")
    return "## Reading it\n\n" + "\n".join(lines) + "\n"


def _positions(encoder: TimmLayoutEncoder, features: dict[str, Any]) -> str:
    if not features["position_embedding_resized_by_export"]:
        return "- **Positions** are for this image size; another size is resized by each library with its own filter."
    return (
        f"- **Positions** were resized once, on export, from {features['position_embedding_from_img_size']} px to "
        f"{encoder.img_size} px ({POSITION_METHOD}); another size is resized by each library with its own filter."
    )


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


def _proof(directory: Path, target: ExportTarget, verification: Verification) -> str:
    rows = ["| file | precision | size | worst difference | lowest cosine | latency |", "| --- " * 6 + "|"]
    for proof in verification.variants:
        latency = "" if proof.latency_ms is None else f"{proof.latency_ms:.1f} ms"
        rows.append(
            f"| `{proof.file}` | {proof.name} | {proof.size_bytes / 1e6:.1f} MB | {proof.worst_difference:.1e} | "
            f"{proof.min_cosine:.6f} | {latency} |"
        )
    hashes = [f"- `{path.name}` sha256 `{sha256(path)}`" for path in _published_files(directory)]
    return (
        "## Verified\n\n"
        f"Before it was published, `{verification.consumer}` loaded this directory in a fresh process with no missing "
        f"and no unexpected weight and gave {reading_of(target).golden} of one fixed image (golden.safetensors). "
        "Latency is the median of five passes at batch 1 on the CPU of the machine that exported it.\n\n"
        + "\n".join([*rows, "", *hashes])
        + "\n"
    )


def _sources(target: ExportTarget, provenance: Provenance) -> list[Source]:
    """Return what the export derives from: the run's sources, and the file or directory given beside the encoder."""
    flag = companion_flag(target)
    path = cast(Path | None, getattr(target, flag, None)) if flag else None
    given = [Source(flag.replace("_", " "), path.resolve().name, GIVEN_LICENCE)] if flag and path else []
    return [*provenance.sources, *given]


def _licences(sources: list[Source]) -> str:
    rows = [f"| {source.role} | `{source.description}` | {source.licence} |" for source in sources]
    unknown = any(source.licence in (UNKNOWN_LICENCE, GIVEN_LICENCE) for source in sources) or not rows
    table = "\n".join(["| what | which | licence |", "| --- | --- | --- |", *rows]) + "\n\n" if rows else ""
    advice = (
        "Where the licence is not recorded, check it before you publish or sell this encoder. "
        if unknown
        else "These are what the files beside the weights declare. "
    )
    return f"## Licences\n\n{table}{advice}Images keep licences of their own, whatever their collection says.\n"


def _recipe(provenance: Provenance) -> str:
    if not provenance.recipe:
        return ""
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(provenance.recipe, sort_keys=False)}```\n"
