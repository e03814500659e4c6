"""Measure our training step against other tools' on a CPU: same student, teacher, batch and images, all in one run.

    bash scripts/bench/peers.sh                                    # once: the others, in an environment of their own
    python scripts/bench/step.py --peers .venv-peers/bin/python         # 224 px, float32, one thread: a few minutes
    python scripts/bench/step.py --peers .venv-peers/bin/python --size 448 --batch 4 --precision bf16-mixed --rounds 5

A ViT-S/14 teaches a ViT-Ti/14, both of timm and untrained, 22.4 GFLOP an image at 224 px. Our side is `distill fit`
with all that it does in training. The others: LightlyTrain's `pretrain`, a plain PyTorch loop, a loop over transformers
models, and timm's own distillation task. All sides are processes that take turns, no side has worker processes, and
figures are images per CPU second (user and system), medians over the rounds, with the matrix-product ceiling beside
them. Telemetry of LightlyTrain is off. `distill` sets its allocator (`distill/heap.py`), the others' is as it comes;
MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=2147483647 in the environment set it for all sides.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from sides import Side, measure
from torch.utils.flop_counter import FlopCounterMode

from distill.data.synthetic import synthesize

HERE = Path(__file__).parent
PEERS = ("lightly_train", "plain", "transformers", "timm")
OFFLINE = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}
GEMM = (2050, 384, 1536)  # the widest product of the teacher's blocks, at eight images


def recipe_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the pair's recipe."""
    shape = {"patch_size": 14, "img_size": options.size}
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "precision": options.precision,
            "max_steps": 1_000_000,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 50,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
        },
        "model": {
            "teachers": {
                "teacher": {
                    "class_path": "teachers.TimmTeacher",
                    "init_args": {
                        "model_name": "vit_small_patch16_224",
                        "weights": "random",
                        "model_args": shape,
                        "dtype": "bfloat16" if options.precision == "bf16-mixed" else "float32",
                    },
                }
            },
            "students": {
                "student": {
                    "class_path": "students.TimmStudent",
                    "init_args": {
                        "model_name": "vit_tiny_patch16_224",
                        "weights": "random",
                        "img_size": options.size,
                        "model_args": {"patch_size": 14},
                    },
                }
            },
            "alignments": [
                {
                    "student": "student",
                    "teacher": "teacher",
                    "num_layers": 1,
                    "head": "linear",
                    "prefix_weight": 0.0,
                }
            ],
            "teacher_micro_batch": "auto",
        },
        "data": {
            "train": str(folder / "train"),
            "img_size_px": options.size,
            "global_batch_size": options.batch,
            # Drawn images are few: an epoch of them would end, and be saved, every other step.
            "samples_per_epoch": 1_000_000 // options.batch * options.batch,
            "num_workers": 0,
            "augment": {"reencode": "none", "horizontal_flip": True},
        },
    }


def draw_images(folder: Path, count: int, size: int) -> Path:
    """Draw images as shards in `train`, and write the same ones as files; return the files' folder."""
    synthesize(folder / "train", images_per_domain=max(1, count // 4), img_size_px=size, num_workers=1)
    files = folder / "files"
    files.mkdir()
    for shard in sorted((folder / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member)
                if data is not None and member.name.endswith((".jpg", ".jpeg", ".png", ".webp")):
                    image = Image.open(io.BytesIO(data.read()))
                    image.convert("RGB").save(files / f"{shard.stem}-{Path(member.name).stem}.jpg", quality=92)
    return files


def add_options(parser: argparse.ArgumentParser, *, batch: int = 8, rounds: int = 5, steps: int = 2) -> None:
    """Add what every benchmark of this pair can be told, with these defaults."""
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="steps a round and side")
    parser.add_argument("--images", type=int, default=64, help="drawn images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")


def our_side(
    name: str,
    recipe: dict[str, Any],
    folder: Path,
    options: argparse.Namespace,
    *words: str,
    kind: str = "fit",
    environment: Mapping[str, str] | None = None,
) -> Side:
    """Return a side that step_ours.py runs; its recipe, run and log get names of their own.

    Args:
        name: in the table, and of its files.
        recipe: what it trains.
        folder: for its files.
        options: those of `add_options`.
        words: further ones for step_ours.py.
        kind: of step_ours.py.
        environment: variables beside this process's.
    """
    file = folder / f"{name}.yaml"
    trainer = recipe["trainer"] | {"default_root_dir": str(folder / f"{name} run")}
    file.write_text(yaml.safe_dump(recipe | {"trainer": trainer}))
    command = [sys.executable, str(HERE / "step_ours.py"), kind, "--recipe", str(file)]
    variables = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": str(options.threads)}
    return Side(name, [*command, "--threads", str(options.threads), *words], variables, folder / f"{name}.log")


def write_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Write figures and options to the file of --json, if one was given."""
    if options.json is not None:
        options.json.write_text(json.dumps({**figures, **vars(options)}, default=str, indent=1) + "\n")


def sides_of(folder: Path, options: argparse.Namespace) -> list[Side]:
    """Return the sides that were asked for."""
    files = draw_images(folder, options.images, options.size)
    sides = [our_side("distill fit", recipe_of(folder, options), folder, options, environment=OFFLINE)]
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(options.threads)}
    for name in options.sides:
        command = [str(options.peers), str(HERE / "step_peers.py"), name, "--images", str(files)]
        for key in ("size", "batch", "precision", "threads"):
            command += [f"--{key}", str(getattr(options, key))]
        sides.append(Side(name, command, environment, folder / f"{name}.log"))
    return sides


def flops_per_image(size: int) -> float:
    """Return operations of the teacher's forward pass and the student's forward and backward, by torch's counter."""
    arguments: dict[str, Any] = {"patch_size": 14, "img_size": size, "num_classes": 0}
    teacher = timm.create_model("vit_small_patch16_224", **arguments)
    student = timm.create_model("vit_tiny_patch16_224", **arguments)
    for module in (*teacher.modules(), *student.modules()):
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch has no formula for the fused kernel of CPUs
    image = torch.rand(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher.forward_features(image)
        student.forward_features(image).sum().backward()
    return float(counter.get_total_flops())


def ceiling_gflops(dtype: torch.dtype) -> float:
    """Return what a matrix product of the teacher's shape reaches, in 10**9 operations a CPU second, at best."""
    rows, inner, columns = GEMM
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    best = 0.0
    for _ in range(10):
        began = time.process_time()
        left @ right
        best = max(best, 2 * rows * inner * columns / (time.process_time() - began) / 1e9)
    return best


def report(sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    """Print the table; return the figures."""
    work = flops_per_image(options.size) / 1e9
    ceiling = ceiling_gflops(torch.bfloat16 if options.precision == "bf16-mixed" else torch.float32)
    table = Table("side", "images per CPU second", "least and most", "ours is", "GFLOP/s", "of the ceiling")
    for side in sides:
        reached = side.median * work
        table.add_row(
            side.name,
            f"{side.median:.2f}",
            f"{min(side.rates):.2f} to {max(side.rates):.2f}",
            f"{sides[0].median / side.median:.2f} x",
            f"{reached:.0f}",
            f"{reached / ceiling:.0%}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{options.size} px, batch {options.batch}, {options.precision}, {options.threads} thread(s), medians of "
        f"{options.rounds} interleaved rounds of {options.steps} steps; {work:.1f} GFLOP an image; a matrix product "
        f"{' x '.join(map(str, GEMM))} reaches {ceiling:.0f} GFLOP/s."
    )
    ratios = {side.name: sides[0].median / side.median for side in sides[1:]}
    return {"rates": {s.name: s.rates for s in sides}, "ratios": ratios, "gflop": work, "ceiling_gflops": ceiling}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, default=Path(".venv-peers/bin/python"), help="Python of the peers' environment"
    )
    parser.add_argument("--sides", nargs="*", choices=PEERS, default=list(PEERS), help="which peers")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        sides = sides_of(Path(name), options)
        measure(sides, rounds=options.rounds, steps=options.steps, batch=options.batch)
    write_figures(report(sides, options), options)


if __name__ == "__main__":
    main()
