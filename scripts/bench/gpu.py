"""Check and measure the real pair on a GPU, at full size with random weights: InternViT-6B teaching a 300M student.

    python scripts/bench/gpu.py --json results.json                # one GPU with 80 GB or more: about 20 minutes
    python scripts/bench/gpu.py --batches 32 64 --skip compile
    python scripts/bench/gpu.py --small --device cpu               # the script itself, at toy size, on any machine

First the results are compared with float32's, and nothing is measured if they are wrong. Then: what a matrix product
and a copy reach; the teacher's forward pass, the student's step and the whole step, eager and compiled, with an FP8
teacher, with activation checkpointing, with two students, and from cached states; and a plain loop over transformers
models of the same shapes. Each as images a second, TFLOP/s, and share of the measured matrix product. A case that does
not fit into memory says so. Operations are those of `distill plan`: what checkpointing does twice counts once.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from fp8 import choose_way, use_float8
from gpu_cases import (
    FULL,
    SMALL,
    Runner,
    Sizes,
    Variant,
    build_task,
    compile_task,
    flops_per_image,
    free_memory,
    mean_cosine,
    ready,
    seconds,
    variants,
)
from gpu_transformers import transformers_step
from rich.console import Console
from rich.progress import track
from rich.table import Table

GOALS = {"whole step, compiled": 42.0, "whole step, FP8 teacher": 60.0, "step from cached states, compiled": 200.0}
"""Images a second on one H200, from the arithmetic of this project's performance goals."""

LEAST_COSINE = 0.999
LOSS_TOLERANCE = 0.02
COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
MATRIX_SIDE = {"cuda": 8192, "cpu": 512}
Figures = dict[str, Any]


def ceilings(device: torch.device) -> Figures:
    """Return what a matrix product reaches in 10**12 operations a second, and a copy in 10**9 bytes a second."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_s = seconds(lambda: left @ right, device, repeats=20)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), device, repeats=20)
    return {"matmul_tflops": 2 * side**3 / product_s / 1e12, "copy_gb_per_s": 2 * source.numel() / copy_s / 1e9}


def check(sizes: Sizes, device: torch.device, *, float8: bool, compiles: bool) -> Figures:
    """Compare what will be measured with float32; return the figures with a verdict.

    The teacher in float32 and the same weights rounded: cosine of its hidden states. The student's first loss under
    autocast against float32. The compiled and the FP8 teacher against the eager one.
    """
    fast = torch.bfloat16 if device.type == "cuda" else torch.float32
    wide = ready(build_task(sizes, torch.float32), device)
    variant = Variant("check", "step", 2)
    runner = Runner(wide, variant, sizes, device)
    exact = wide.teachers.forward_hidden_states(runner.images, runner.layers)["teacher"]
    runner.dtype = None
    exact_loss = float(runner.loss().detach())
    teacher = wide.teachers["teacher"].to(fast)
    cast(Any, teacher).dtype = fast
    runner.dtype = fast if device.type == "cuda" else None
    rounded = wide.teachers.forward_hidden_states(runner.images, runner.layers)["teacher"]
    found: Figures = {
        "teacher_cosine": mean_cosine(rounded, exact),
        "loss_float32": exact_loss,
        "loss_autocast": float(runner.loss().detach()),
    }
    if compiles:
        compile_task(wide)
        compiled = wide.teachers.forward_hidden_states(runner.images, runner.layers)["teacher"]
        found["compiled_cosine"] = mean_cosine(compiled, rounded)
    if float8:
        use_float8(teacher, choose_way(device))
        eight = wide.teachers.forward_hidden_states(runner.images, runner.layers)["teacher"]
        found["fp8_cosine"] = mean_cosine(eight, rounded)
    right = found["teacher_cosine"] >= LEAST_COSINE and found.get("compiled_cosine", 1.0) >= LEAST_COSINE
    found["passed"] = right and abs(found["loss_autocast"] - exact_loss) <= LOSS_TOLERANCE
    return found


def measure(variant: Variant, sizes: Sizes, device: torch.device, ceiling: float, repeats: int) -> Figures:
    """Return a variant's row."""
    row: Figures = {**asdict(variant)}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        task = ready(build_task(sizes, dtype, students=variant.students, checkpoints=variant.checkpoints), device)
        if variant.float8:
            use_float8(task.teachers["teacher"], choose_way(device))
        if variant.compiles:
            compile_task(task)
        rate = variant.batch / seconds(Runner(task, variant, sizes, device), device, repeats=repeats)
        row |= rates(rate, flops_per_image(sizes, variant, device), ceiling)
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    free_memory()
    return row


def rates(images_per_s: float, flops: float, ceiling: float) -> Figures:
    """Return images a second, TFLOP/s, and their share of the ceiling."""
    tflops = images_per_s * flops / 1e12
    return {"images_per_s": images_per_s, "tflops": tflops, "share": tflops / ceiling}


def transformers_row(sizes: Sizes, batch: int, device: torch.device, ceiling: float, repeats: int) -> Figures:
    """Return the row of a plain loop over transformers models of the same shapes."""
    row: Figures = {"name": "transformers loop", "batch": batch}
    try:
        rate = batch / seconds(transformers_step(sizes, batch, device), device, repeats=repeats)
        row |= rates(rate, flops_per_image(sizes, Variant("", "step", batch), device), ceiling)
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except ImportError:
        row["failed"] = "transformers is not installed"
    free_memory()
    return row


def print_rows(console: Console, rows: list[Figures], limits: Figures) -> None:
    """Print the table."""
    table = Table("case", "batch", "images/s", "TFLOP/s", "of the matrix product", "goal on an H200")
    for row in rows:
        numbers = (
            [f"{row['images_per_s']:.1f}", f"{row['tflops']:.3g}", f"{row['share']:.0%}"] if "tflops" in row else []
        )
        goal = GOALS.get(str(row["name"]))
        goal_text = "" if goal is None else f"{goal:.0f}"
        table.add_row(str(row["name"]), str(row["batch"]), *(numbers or [str(row["failed"]), "", ""]), goal_text)
    console.print(table)
    console.print(
        f"A matrix product reaches {limits['matmul_tflops']:.3g} TFLOP/s, a copy {limits['copy_gb_per_s']:.0f} GB/s."
    )


def parse(words: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="toy models, to try the script itself")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each case; the median counts")
    parser.add_argument("--skip", nargs="*", choices=("compile", "fp8", "transformers"), default=[])
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> Figures:
    """Check, measure and print; return the figures.

    Raises:
        SystemExit: there is no GPU, or the results are wrong.
    """
    options, console = parse(words), Console(width=120)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here. `--small --device cpu` tries the script itself.")
    device, sizes = torch.device(options.device), SMALL if options.small else FULL
    float8, compiles = "fp8" not in options.skip, "compile" not in options.skip
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    facts = check(sizes, device, float8=float8, compiles=compiles)
    console.print({"machine": machine, "torch": torch.__version__, "fp8": choose_way(device), **facts})
    if not facts["passed"]:
        sys.exit("The results differ from float32's: nothing is measured.")
    free_memory()
    limits = ceilings(device)
    ceiling, cases = limits["matmul_tflops"], variants(options.batches, compiles=compiles, float8=float8)
    rows = [measure(case, sizes, device, ceiling, options.repeats) for case in track(cases, console=console)]
    if "transformers" not in options.skip:
        rows += [transformers_row(sizes, batch, device, ceiling, options.repeats) for batch in options.batches]
    print_rows(console, rows, limits)
    is_full = not options.small and device.type == "cuda"
    figures: Figures = {"machine": machine, "torch": torch.__version__, "is_full_size": is_full}
    figures |= {"fp8": choose_way(device), "check": facts, "ceilings": limits, "rows": rows}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
