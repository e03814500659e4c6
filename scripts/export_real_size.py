"""Export a full-size student of random weights in every installed format; print size, time, difference and memory.

    python scripts/export_real_size.py --out /somewhere/with/30/GB
    python scripts/export_real_size.py --out /tmp/tiny --tiny true

304 million parameters at 448 px, both layouts. Each format runs in a process of its own, one after the other, so the
peak memory is its own: of the exporting process, and of the fresh process in which the consumer verifies. Exports are
removed once measured unless `--keep true`.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import nn

TINY = {"img_size": 56, "embed_dim": 64, "depth": 4, "num_heads": 4}
FULL = {"img_size": 448, "embed_dim": 1024, "depth": 24, "num_heads": 16}
LLM_WIDTH = 896  # Qwen2-0.5B's, the language model of InternVL2.5-1B
CLIP_FORMATS = ("clip-hf", "open_clip")


def measure(out: Path, tiny: bool = False, keep: bool = False, format: str = "all") -> None:
    """Export every format that is installed, and print a line for each.

    Args:
        out: a folder for the exports.
        tiny: a student of four small blocks, to try this script.
        keep: leave the exports there.
        format: one format, in this process; all starts a process for each.
    """
    if format != "all":
        print(json.dumps(measure_one(format, out, TINY if tiny else FULL)))
        return
    from distill.export.targets import TARGETS

    failures = 0
    print(
        f"{'format':<12} {'size':>10} {'seconds':>8} {'worst':>9} {'cosine':>9} {'latency':>10} {'RSS':>8} {'fresh':>8}"
    )
    for name in TARGETS:
        words = ["--out", str(out), "--tiny", str(tiny).lower(), "--format", name]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failures += 1
            print(f"{name:<12} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
            continue
        print_rows(json.loads(done.stdout.strip().splitlines()[-1]))
        if not keep:
            shutil.rmtree(out / name, ignore_errors=True)
    raise SystemExit(1 if failures else 0)


def print_rows(figures: dict[str, Any]) -> None:
    if "left_out" in figures:
        print(f"{figures['format']:<12} left out: {figures['left_out']}", flush=True)
        return
    for variant in figures["variants"]:
        latency = "" if variant["latency_ms"] is None else f"{variant['latency_ms']:.0f} ms"
        print(
            f"{figures['format']:<12} {variant['size_bytes'] / 1e6:>7.1f} MB {figures['seconds']:>8.1f} "
            f"{variant['worst_difference']:>9.1e} {variant['min_cosine']:>9.6f} {latency:>10} "
            f"{figures['peak_gb']:>5.1f} GB {figures['fresh_peak_gb']:>5.1f} GB  {variant['name']}",
            flush=True,
        )


def measure_one(format: str, out: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Return what exporting a random student in one format took."""
    from distill.errors import ConfigError, ExportError
    from distill.export.contract import bind_companion, companion_flag
    from distill.export.fresh_process import require_consumer
    from distill.export.run import as_timm_layout, export_encoder
    from distill.export.targets import find_target

    student = random_student(format, sizes)
    target = find_target(format)
    companion = write_companion(companion_flag(target), out, sizes)
    target = target if companion is None else bind_companion(target, companion)
    try:
        require_consumer(target)
        target.check(as_timm_layout(student))
    except (ConfigError, ExportError) as error:
        return {"format": format, "left_out": str(error)}
    start = time.perf_counter()
    exported = export_encoder(as_timm_layout(student), format, out / format, overwrite=True, companion=companion)
    return {
        "format": format,
        "seconds": time.perf_counter() - start,
        "variants": [vars(variant) for variant in exported.verification.variants],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "fresh_peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }


def random_student(format: str, sizes: dict[str, int]) -> nn.Module:
    """Return a student whose every weight is noise: the ones and zeros of a new one would hide exchanged tensors."""
    from students import CLIPViT, InternViT

    student: Any = (CLIPViT if format in CLIP_FORMATS else InternViT)(weights="random", **sizes)
    student.load_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
            if name.endswith("gamma"):
                parameter.add_(0.1)
    return student.eval()


def write_companion(flag: str | None, out: Path, sizes: dict[str, int]) -> Path | None:
    """Write what a format needs beside the encoder, with random weights; None where it needs nothing."""
    if flag is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    return write_projector(out, sizes) if flag == "projector" else write_text_tower(out / "clip", sizes)


def write_projector(out: Path, sizes: dict[str, int]) -> Path:
    width = 4 * sizes["embed_dim"]
    shapes = {"mlp1.0": (width,), "mlp1.1": (LLM_WIDTH, width), "mlp1.3": (LLM_WIDTH, LLM_WIDTH)}
    tensors = {f"{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0]) * 0.02 for name, shape in shapes.items()}
    save_file(tensors, out / "projector.safetensors")
    return out / "projector.safetensors"


def write_text_tower(directory: Path, sizes: dict[str, int]) -> Path:
    import open_clip

    directory.mkdir(parents=True, exist_ok=True)
    head_width = sizes["embed_dim"] // sizes["num_heads"]
    vision = {"image_size": 56, "layers": 1, "width": sizes["embed_dim"], "head_width": head_width, "patch_size": 14}
    width, layers = (768, 12) if sizes["embed_dim"] >= FULL["embed_dim"] else (16, 2)  # CLIP-ViT-L's text tower
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": layers, "layers": layers}
    config: dict[str, Any] = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.CLIP(**{**config, "vision_cfg": dict(vision), "text_cfg": dict(text)})
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
