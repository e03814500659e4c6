"""Measure feature extraction against a plain PyTorch loop over the same model and images, both sides in one run.

    python scripts/bench/features.py                                              # a random ViT-S/16 at 224 px
    python scripts/bench/features.py --model tf_efficientnet_lite0 --img-size-px 448 --weights FILE
    python scripts/bench/features.py --dense                                      # B also keeps all patch tokens

Side A is what one writes by hand: a DataLoader with batches of --batch-size, the model under `no_grad`, the mean over
patch tokens, kept in a list. Side B is `distill.probe.features.extract` on the same samples: it also checks that every
feature is finite, keeps labels, domains and rows, and leaves out images that cannot be decoded. Images are in memory:
decoding has its own benchmark. Medians over interleaved rounds; the features of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.probe.features import extract
from students import TimmStudent


class Images(Dataset[dict[str, Any]]):
    """Drawn uint8 images with a label, a domain and a row each."""

    def __init__(self, count: int, size_px: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (count, 3, size_px, size_px), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": index % 10, "domain": 0, "row": index}


@torch.no_grad()
def plain(encoder: TimmStudent, images: Images, batch_size: int, device: str) -> Tensor:
    """Side A: pooled features `[N, D]` by a plain loop."""
    encoder.to(device).eval()
    kept: list[Tensor] = []
    for batch in DataLoader(images, batch_size=batch_size):
        _, patches = encoder.forward_hidden_states(batch["image"].to(device), 1)[-1]
        kept.append(patches.flatten(1, 2).mean(1).cpu())
    return torch.cat(kept)


def seconds(function: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Return wall and CPU seconds of a call, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    """Print the table, the ratios and, with --json, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm architecture")
    parser.add_argument("--weights", default="random", help="a file of timm's key names, or random")
    parser.add_argument("--img-size-px", type=int, default=224)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dense", action="store_true", help="side B keeps the patch tokens of the whole grid besides")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size_px, device, batch_size = options.img_size_px, options.device, options.batch_size
    encoder = TimmStudent(options.model, options.weights, size_px)
    encoder.load_weights()
    images = Images(options.count, size_px)
    quiet = Console(quiet=True)
    grid = (size_px // encoder.patch_size,) * 2 if options.dense else None

    def ours() -> Tensor:
        how: dict[str, Any] = {"batch_size": batch_size, "device": device, "img_size_px": size_px, "dense_grid": grid}
        return extract(encoder, images, console=quiet, **how).pooled

    sides: dict[str, Callable[[], Tensor]] = {
        "A plain loop": lambda: plain(encoder, images, batch_size, device),
        "B extract": ours,
    }
    results = {name: seconds(side)[2] for name, side in sides.items()}  # also warms both up
    worst = float((results["A plain loop"] - results["B extract"]).abs().max())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in sorted(sides, reverse=turn % 2 == 1):
            times[name].append(seconds(sides[name])[:2])
    table = Table("side", "images/s", "images/CPU-s")
    for name, values in times.items():
        rates = (options.count / statistics.median(value[at] for value in values) for at in (0, 1))
        table.add_row(name, *(f"{rate:.1f}" for rate in rates))
    pairs = list(zip(*times.values(), strict=True))
    wall, cpu = (statistics.median(a[at] / b[at] for a, b in pairs) for at in (0, 1))
    console = Console()
    console.print(table)
    console.print(f"B / A: {wall:.3f} by wall time, {cpu:.3f} by CPU time; largest difference {worst:.1e}")
    if options.json:
        figures = {"wall": wall, "cpu": cpu, "largest_difference": worst, "times": times}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
