"""Measure the linear probe's sweep over C against scikit-learn's LogisticRegression, both sides in one run.

    python scripts/bench/linear_probe.py --threads 1                            # 50,000 x 1,024, 100 classes: 12 min
    python scripts/bench/linear_probe.py --n 10000 --dim 512 --classes 50 --rounds 3
    python scripts/bench/linear_probe.py --features FILE.safetensors            # "features" [N, D], "targets" [N]

Both sides get the same standardised float32 features, the same ascending grid of C and the same number of threads; each
fits every C on the fit part, chooses by accuracy on the selection part, and is scored on the test part. Side A is
LogisticRegression (lbfgs, tol 1e-4, its default), one cold fit a C; side A+ the same with `warm_start=True` (--warm).
Side B is `distill.probe.linear.fit_path`, and its time includes finding the basis and polishing the chosen fit to
FINAL_TOLERANCE. The table shows for each C the objective that each side reached, divided by C times N and evaluated in
float64 by one function: a quicker side that stops earlier would show a higher one.

With 2 threads on 2 cores that other processes also use, scikit-learn's OpenBLAS waits in a spin and takes up to 17
times as long as with 1: measure 2 threads on an idle machine, and 1 thread otherwise.

Drawn features have variances that fall as 1 / rank along random directions, as those of encoders roughly do, and class
means that fall faster still: the first directions tell most. Fit, selection and test parts are as 5 : 1 : 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from distill.probe.linear import COARSE_CS, FINAL_TOLERANCE, MAX_ITER, fit_path, standardise
from distill.probe.logistic import LogisticProblem

SKLEARN_TOLERANCE = 1e-4
"""Its default, and CLIP's setting."""


@dataclass(frozen=True)
class Data:
    """Standardised features `[n, D]` and classes `[n]` of the three parts."""

    fit: tuple[Tensor, Tensor]
    select: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


@dataclass(frozen=True)
class Fit:
    """One fitted classifier and what it took."""

    c: float
    weight: Tensor
    bias: Tensor
    cpu_s: float
    wall_s: float
    iterations: int


def draw(n: int, dim: int, num_classes: int, separation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return features `[7 n / 5, dim]`, float32, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    total = n * 7 // 5
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scale = torch.arange(1, dim + 1).float().rsqrt()
    targets = torch.randint(num_classes, (total,), generator=generator)
    means = separation * torch.randn(num_classes, dim, generator=generator) * scale
    latent = torch.randn(total, dim, generator=generator)
    for rows in torch.arange(total).split(4096):
        latent[rows] = ((latent[rows] + means[targets[rows]]) * scale) @ rotation
    return latent, targets


def split(features: Tensor, targets: Tensor) -> Data:
    """Split features as 5 : 1 : 1 and standardise them by the fit part."""
    n = len(targets) * 5 // 7
    x = standardise(features, features[:n])
    parts = [(x[at], targets[at]) for at in (slice(0, n), slice(n, n * 6 // 5), slice(n * 6 // 5, None))]
    return Data(*parts, num_classes=int(targets.max()) + 1)  # type: ignore[arg-type]


def fit_sklearn(data: Data, cs: Sequence[float], warm: bool) -> list[Fit]:
    """Side A: one LogisticRegression a C."""
    x, y = data.fit[0].numpy(), data.fit[1].numpy()
    model = LogisticRegression(tol=SKLEARN_TOLERANCE, max_iter=MAX_ITER, warm_start=warm)
    fits: list[Fit] = []
    for c in cs:
        cpu, wall = time.process_time(), time.perf_counter()
        model.set_params(C=c).fit(x, y)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        weight, bias = (torch.from_numpy(np.array(value)).float() for value in (model.coef_, model.intercept_))
        fits.append(Fit(c, weight, bias, cpu, wall, int(model.n_iter_.max())))
    return fits


def fit_ours(data: Data, cs: Sequence[float]) -> list[Fit]:
    """Side B: the path. The first C's time includes the basis; the last entry is the polished fit of the chosen C."""
    fits: list[Fit] = []
    cpu, wall = time.process_time(), time.perf_counter()

    def note(model: object, c: float, weight: Tensor, bias: Tensor) -> None:
        nonlocal cpu, wall
        now = time.process_time(), time.perf_counter()
        fits.append(Fit(c, weight, bias, now[0] - cpu, now[1] - wall, -1))
        cpu, wall = now

    problem = LogisticProblem(*data.fit, data.num_classes)
    models = {}
    for model in fit_path(problem, cs):
        models[model.c] = model
        note(model, model.c, model.weight, model.bias)
    best = choose(fits, data)
    final = problem.solve(best.c, models[best.c], tolerance=FINAL_TOLERANCE, max_iter=MAX_ITER)
    note(final, final.c, final.weight, final.bias)
    return fits


def top1(fit: Fit, part: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a fit on a part, in per cent."""
    return 100 * float((F.linear(part[0], fit.weight, fit.bias).argmax(1) == part[1]).double().mean())


def choose(fits: Sequence[Fit], data: Data) -> Fit:
    """Return the fit with the highest accuracy on the selection part; a tie goes to the stronger regularisation."""
    return max(fits, key=lambda fit: (top1(fit, data.select), -fit.c))


def objective(fit: Fit, data: Data) -> tuple[float, float]:
    """The objective divided by `C * N`, and the largest entry of its gradient; in float64."""
    weight, bias = fit.weight.double(), fit.bias.double()
    n = len(data.fit[1])
    loss, slope, offset = 0.0, weight / (fit.c * n), torch.zeros_like(bias)
    for x, y in zip(data.fit[0].split(4096), data.fit[1].split(4096), strict=True):
        logits = F.linear(x.double(), weight, bias)
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        residual = logits.softmax(1) - F.one_hot(y, len(bias))
        slope += residual.T @ x.double() / n
        offset += residual.sum(0) / n
    value = loss / n + float(weight.square().sum()) / (2 * fit.c * n)
    return value, max(float(slope.abs().max()), float(offset.abs().max()))


def report(sides: dict[str, list[Fit]], data: Data, console: Console) -> dict[str, object]:
    """Print what each side reached at each C, and return the accuracies of the chosen fits."""
    table = Table("C", *(f"{name}: {what}" for name in sides for what in ("s", "objective", "gradient", "select %")))
    for fits in zip(*sides.values(), strict=False):
        cells: list[str] = []
        for fit in fits:
            value, slope = objective(fit, data)
            cells += [f"{fit.wall_s:.1f}", f"{value:.6f}", f"{slope:.1e}", f"{top1(fit, data.select):.2f}"]
        table.add_row(f"{fits[0].c:g}", *cells)
    console.print(table)
    figures: dict[str, object] = {}
    for name, fits in sides.items():
        best = choose(fits, data)
        best = fits[-1] if name.startswith("B") else best  # B's last fit is the chosen one, polished
        value, slope = objective(best, data)
        figures[name] = {"C": best.c, "test": top1(best, data.test), "objective": value, "gradient": slope}
        console.print(
            f"{name}: C {best.c:g}, test accuracy {top1(best, data.test):.2f} %, objective {value:.6f}, largest "
            f"gradient entry {slope:.1e}"
        )
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000, help="images of the fit part")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--separation", type=float, default=1.2, help="of drawn class means; more is easier")
    parser.add_argument("--features", type=Path, help="a safetensors file instead of drawn features")
    parser.add_argument("--cs", type=float, nargs="+", default=list(COARSE_CS), help="ascending values of C")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds; medians are taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="also scikit-learn with warm_start=True")
    parser.add_argument("--only-ours", action="store_true", help="side B alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    """Run the rounds, print the table and the ratios and, with --json, write them."""
    options, console = parse(), Console()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    if options.features:
        tensors = load_file(options.features)
        data = split(tensors["features"].float(), tensors["targets"].long())
    else:
        data = split(*draw(options.n, options.dim, options.classes, options.separation, seed=0))
    console.print(f"fit {tuple(data.fit[0].shape)}, {data.num_classes} classes, {options.threads} threads")
    runs: dict[str, Callable[[], list[Fit]]] = {"B path": lambda: fit_ours(data, options.cs)}
    if not options.only_ours:
        runs = {"A scikit-learn": lambda: fit_sklearn(data, options.cs, warm=False), **runs}
    if options.warm:
        runs["A+ warm"] = lambda: fit_sklearn(data, options.cs, warm=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    fits: dict[str, list[Fit]] = {}
    with threadpool_limits(options.threads):
        for _ in range(options.rounds):
            for name, run in runs.items():
                fits[name] = run()
                times[name].append((sum(fit.wall_s for fit in fits[name]), sum(fit.cpu_s for fit in fits[name])))
                console.print(f"{name}: {times[name][-1][0]:.1f} s wall, {times[name][-1][1]:.1f} s CPU")
        figures = report(fits, data, console)
    for name in runs:
        if name == "B path":
            continue
        pairs = list(zip(times[name], times["B path"], strict=True))
        wall, cpu = (statistics.median(a[at] / b[at] for a, b in pairs) for at in (0, 1))
        console.print(f"{name} / B: {wall:.2f} by wall time, {cpu:.2f} by CPU time, over {options.rounds} round(s)")
        figures[f"{name} / B"] = {"wall": wall, "cpu": cpu}
    if options.json:
        options.json.write_text(json.dumps({"times": times, **figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
