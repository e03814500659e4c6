"""Print what distill's attention probe measures on this machine, and which kernel it chooses.

    python scripts/bench/attention.py                     # float32, and bfloat16 where this CPU computes it fast
    python scripts/bench/attention.py --rounds 5

Shapes are those of the 6B teacher and of students, at 224 and 448 px. Times are CPU milliseconds of one call, medians
of repeated probes; the probe itself takes the least of five interleaved calls.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table

from distill.attention_probe import Kernel, choose_attention, measure_attention
from distill.precision import cpu_has_fast_bfloat16

# Images, heads, tokens, width of a head, and whether the backward pass counts.
SHAPES = {
    "InternViT-6B, 448 px": (1, 25, 1025, 128, False),
    "InternViT-300M, 448 px": (1, 16, 1025, 64, True),
    "InternViT-300M, 224 px": (4, 16, 257, 64, True),
    "ViT-S, 224 px": (1, 6, 257, 64, False),
    "ViT-Ti, 224 px": (8, 3, 257, 64, True),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtypes = [torch.float32] + ([torch.bfloat16] if cpu_has_fast_bfloat16() else [])
    table = Table("encoder", "dtype", "fused, ms", "explicit, ms", "fused is", "chosen")
    for name, (images, heads, tokens, width, trains) in SHAPES.items():
        for dtype in dtypes:
            times: dict[Kernel, list[float]] = {"sdpa": [], "explicit": []}
            for _ in range(options.rounds):
                measure_attention.cache_clear()
                for kernel, value in measure_attention(images, heads, tokens, width, dtype, trains).items():
                    times[kernel].append(1e3 * value)
            fused, explicit = (statistics.median(values) for values in times.values())
            shape = (heads, tokens, width)
            chosen = choose_attention(shape, images=images, device=torch.device("cpu"), dtype=dtype, trains=trains)
            passes = "forward and backward" if trains else "forward"
            row = [f"{name}, {passes}", str(dtype).removeprefix("torch."), f"{fused:.1f}", f"{explicit:.1f}"]
            table.add_row(*row, f"{explicit / fused:.2f} x as fast", chosen)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
