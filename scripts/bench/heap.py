"""Measure what keeping freed memory saves: forward passes with and without `distill.heap`, both sides in one run.

    python scripts/bench/heap.py                              # EfficientNet-Lite0, 448 px, one thread: about a minute
    python scripts/bench/heap.py --model vit_small_patch14_dinov2 --batch 8

Each round starts a fresh process a side, since an allocator's settings cannot be taken back. Figures are images per CPU
second (user and system) and the share of it that the system took, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

SIDES = ("freed to the system", "kept")


def measure(side: str, model: str, size: int, batch: int, passes: int, threads: int) -> dict[str, float]:
    """Return CPU seconds of a few forward passes with random weights in this process."""
    import timm
    import torch

    from distill.heap import keep_freed_memory

    if side == SIDES[1] and not keep_freed_memory():
        raise SystemExit(
            "This platform's allocator takes no settings, or the environment sets them: nothing to measure."
        )
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"img_size": size} if "vit" in model else {}
    network = timm.create_model(model, pretrained=False, num_classes=0, **options).eval()
    network = network.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(2):
            network(images)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(passes):
            network(images)
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {"images_per_cpu_s": batch * passes / (user + system), "system_share": system / (user + system)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm's name")
    parser.add_argument("--size", type=int, default=448, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passes", type=int, default=8, help="timed forward passes a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    words = (arguments.model, arguments.size, arguments.batch, arguments.passes, arguments.threads)
    if arguments.side:
        print(json.dumps(measure(arguments.side, *words)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout))
    rates = {}
    for side, rounds in found.items():
        rates[side] = statistics.median(one["images_per_cpu_s"] for one in rounds)
        share = statistics.median(one["system_share"] for one in rounds)
        print(f"{side:<20} {rates[side]:6.2f} images per CPU second, {share:4.0%} of it the system's")
    print(f"ratio {rates[SIDES[1]] / rates[SIDES[0]]:.2f}")


if __name__ == "__main__":
    main()
