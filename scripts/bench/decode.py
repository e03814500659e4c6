"""Measure decoding and resizing inside the real loader against a plain Pillow loop, both sides in one run.

    python scripts/bench/decode.py                          # generated photographs, 500 x 375 and 1600 x 1200
    python scripts/bench/decode.py --images FOLDER          # a folder of JPEGs, searched with its sub-folders
    python scripts/bench/decode.py --step                   # also: the input's share of the demo pair's step

Side A reads each file's bytes from memory, decodes with Pillow, resizes to 448 x 448 by Pillow's bicubic filter
(antialiased) and makes an array: what torchvision's transforms on Pillow images do. Side B is `ShardDataModule` with
no augmentation: plan, reading from the shard, decoding, resizing, batching. Both use one thread; the figures are images
per CPU second (user and system), medians over interleaved rounds. The printed PSNR compares B's views with A's.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.table import Table

from distill.data.datamodule import ShardDataModule
from distill.data.fetch import PlannedDataset
from distill.data.transforms import Augmentation

SIZE_PX = 448
MIN_SAMPLES = 8192
"""Side B's shards hold the files again and again up to so many samples, about 1 GB."""
NEEDED = {"online InternViT-6B, bf16": 42, "cached states": 198}
"""Images a second that one H200 is expected to eat (arithmetic for the full-size pair at 448 px, unmeasured)."""


def photographs(count: int, width: int, height: int) -> list[bytes]:
    """Draw smooth colours, edges and noise, and compress them to about 110 kB at 500 x 375."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    files: list[bytes] = []
    for number in range(count):
        waves = np.stack([np.sin(x / (17 + number) + y / 29), np.cos(x / 41), np.sin(y / 13)], axis=-1) * 80 + 128
        waves[(x // 40 + y // 30) % 5 == number % 5] = (250, 240, 20)
        pixels = (waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


def read_files(folder: Path, count: int) -> list[bytes]:
    """Return the bytes of the first `count` JPEGs under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not paths:
        sys.exit(f"{folder} holds no .jpg file; give a folder of JPEGs by --images.")
    return [path.read_bytes() for path in paths]


def pillow_views(files: list[bytes]) -> list[np.ndarray]:
    """Side A: decode and resize every file by Pillow."""
    views: list[np.ndarray] = []
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            views.append(np.asarray(image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)))
    return views


def data_module(shards: Path, count: int, augment: Augmentation) -> ShardDataModule:
    """Return side B over a folder of shards, one pass being as many samples as there are files."""
    batch = math.gcd(count, 16)
    data = ShardDataModule(
        str(shards),
        img_size_px=SIZE_PX,
        global_batch_size=batch,
        num_workers=0,
        augment=augment,
        samples_per_epoch=count,
    )
    data.setup("fit")
    return data


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time, user and system, that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def exhaust(data: ShardDataModule) -> None:
    """Go through one pass of the training batches."""
    for _ in data.train_dataloader():
        pass


def mean_psnr_db(files: list[bytes], data: ShardDataModule) -> float:
    """Return the PSNR of side B's views against side A's, over all pixels of all images."""
    dataset = PlannedDataset(data.plan, SIZE_PX, data.augment)
    expected = pillow_views(files)
    total = sum(
        float(np.mean((dataset.rows[row]["image"].permute(1, 2, 0).numpy().astype(float) - expected[row]) ** 2))
        for row in range(len(files))
    )
    return 10 * math.log10(255**2 / (total / len(files)))


def measure(name: str, files: list[bytes], rounds: int, table: Table) -> dict[str, float]:
    """Measure one set of files and add its line to the table."""
    with tempfile.TemporaryDirectory() as folder:
        with wds.TarWriter(str(Path(folder, "bench-000000.tar"))) as writer:  # type: ignore[attr-defined]
            # Grain's shuffle walks through 2^16 places: 0.7 ms a sample for 320 of them. Training sets are larger.
            for number in range(max(len(files), MIN_SAMPLES // len(files) * len(files))):
                writer.write({"__key__": f"{number:06d}", "jpg": files[number % len(files)]})
        plain = data_module(Path(folder), len(files), Augmentation(reencode="none"))
        again = data_module(Path(folder), len(files), Augmentation(reencode="jpeg"))
        sides: dict[str, Callable[[], object]] = {
            "pillow": lambda: pillow_views(files),
            "loader": lambda: exhaust(plain),
            "loader, JPEG again": lambda: exhaust(again),
        }
        for side in sides.values():
            side()
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, function in sides.items():
                seconds[side].append(cpu_seconds(function))
        rates = {side: len(files) / statistics.median(values) for side, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["pillow"], seconds["loader"], strict=True)]
        result = {**rates, "ratio": statistics.median(ratios), "psnr_db": mean_psnr_db(files, plain)}
    cells = (f"{result[key]:.0f}" for key in ("pillow", "loader", "loader, JPEG again"))
    table.add_row(name, str(len(files)), *cells, f"{result['ratio']:.2f}", f"{result['psnr_db']:.1f}")
    return result


def step_seconds(batch_size: int, rounds: int) -> float:
    """Return the CPU seconds an image of the demo pair's whole step: teacher, student, backward, optimiser."""
    import yaml

    from distill.checkpoint import build_encoder
    from distill.precision import choose_precision
    from distill.task import DistillationTask

    recipe = yaml.safe_load(Path("configs/demo.yaml").read_text(encoding="utf-8"))["model"]
    teachers, students = (
        {name: build_encoder(spec) for name, spec in recipe[kind].items()} for kind in ("teachers", "students")
    )
    task = DistillationTask(teachers, students, teacher_micro_batch=recipe["teacher_micro_batch"])  # type: ignore[arg-type]
    task.configure_model()
    optimizer = torch.optim.AdamW(task.parameters(), fused=True)
    images = torch.randint(0, 256, (batch_size, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    batch = {"images": images, "row": torch.arange(batch_size), "domain": torch.zeros(batch_size, dtype=torch.int64)}

    is_mixed = choose_precision("cpu") == "bf16-mixed"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = task._step(batch)["loss/total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return statistics.median(cpu_seconds(step) for _ in range(rounds)) / batch_size


def main() -> None:
    """Print the table, the ratios and, with --json, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; generated photographs when left out")
    parser.add_argument("--count", type=int, default=96, help="images of each set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step", action="store_true", help="also measure the demo pair's step")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("images", "n", "A pillow, img/CPU-s", "B loader", "B, JPEG again", "B / A", "PSNR dB")
    if options.images:
        sets = {str(options.images.name): read_files(options.images, options.count)}
    else:
        sets = {f"{w} x {h}": photographs(options.count // (w // 500), w, h) for w, h in ((500, 375), (1600, 1200))}
    figures = {name: measure(name, files, options.rounds, table) for name, files in sets.items()}
    console = Console()
    console.print(table)
    for name, figure in figures.items():
        for device, need in NEEDED.items():
            console.print(
                f"{name}: one core feeds {figure['loader'] / need:.1f} GPUs that eat {need} images/s ({device})"
            )
    if options.step:
        step = step_seconds(8, options.rounds)
        for name, figure in figures.items():
            share = 1 / figure["loader"] / step
            figure["share_of_step"] = share
            console.print(f"{name}: input takes {share:.2%} of the demo pair's step ({step * 1e3:.1f} ms CPU an image)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
