"""Measure the projection and cosine in chunks against holding them whole: time, memory and the gradients' difference.

    python scripts/bench/projection.py                    # 1024 -> 3200 channels, 2050 tokens (two images at 448 px)
    python scripts/bench/projection.py --precision bf16

Figures are CPU milliseconds for forward and backward, medians of interleaved rounds; bytes that autograd keeps between
them, each storage once; and the largest relative error of a gradient against float32 held whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distill.losses import token_cosine
from distill.projected_cosine import projected_cosine


def saved_bytes(loss_of: Callable[[], Tensor]) -> int:
    """Return the bytes that a loss keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of().backward()
    return sum(sizes.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2050)
    parser.add_argument("--widths", type=int, nargs=2, default=[1024, 3200])
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    narrow, wide = options.widths
    projection, tokens = nn.Linear(narrow, wide), torch.randn(options.tokens, narrow, requires_grad=True)
    is_bf16 = options.precision == "bf16"
    teacher = torch.randn(options.tokens, wide).to(torch.bfloat16 if is_bf16 else torch.float32)
    inputs = [tokens, projection.weight, projection.bias]

    def whole() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            return token_cosine(projection(tokens), teacher).mean()

    def chunked(chunk: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                return projected_cosine(tokens, projection, teacher, lambda part: part, chunk)

        return loss

    exact = torch.autograd.grad(token_cosine(projection(tokens), teacher).mean(), inputs)
    sides = {"held whole": whole, **{f"chunks of {chunk}": chunked(chunk) for chunk in options.chunks}}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, loss in sides.items():
            began = time.process_time()
            torch.autograd.grad(loss(), inputs)
            times[name].append(1e3 * (time.process_time() - began))
    table = Table("projection and cosine", "CPU ms", "saved for backward, MB", "gradient error")
    for name, loss in sides.items():
        found = torch.autograd.grad(loss(), inputs)
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        table.add_row(name, f"{statistics.median(times[name]):.0f}", f"{saved_bytes(loss) / 1e6:.1f}", f"{error:.1e}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{options.tokens} tokens, {narrow} -> {wide}, {options.precision}, {options.threads} thread(s).")


if __name__ == "__main__":
    main()
