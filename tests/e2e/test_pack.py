"""`distill pack` as a command: killed, with a full disk, on Ray, and as the way to a training run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.data.index import build_index
from distill.data.pack import pack

# Only for a machine that is very busy; each wait ends at its event.
PATIENCE_S = 300


def write_photos(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir()
    for number in range(count):
        buffer = BytesIO()
        Image.new("RGB", size, (number % 256, number // 256, 9)).save(buffer, "PNG", compress_level=0)
        (folder / f"{number:05d}.png").write_bytes(buffer.getvalue())
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}


def command(source: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "distill", "pack", str(source), str(out), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment())


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_half_way_and_run_again_it_gives_the_same_bytes_and_leaves_no_process(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 1200)
    options = ("--domain", "natural", "--images_per_shard", "3", "--num_workers", "2")
    whole = run(command(photos, tmp_path / "whole", *options))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    manifest = out / "manifest.jsonl"
    process = subprocess.Popen(command(photos, out, *options), env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") >= 5, "the fifth shard")
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE_S)
    done = manifest.read_bytes().count(b"\n")
    assert len(workers) >= 2
    assert done < 400, "it was through before it could be killed"
    wait_until(lambda: not any(map(is_alive, workers)), "the end of the workers")
    again = run(command(photos, out, *options))
    assert again.returncode == 0, again.stderr
    assert f"400 shards, {400 - done} of them new" in again.stdout
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_full_disk_leaves_nothing_half_written_and_can_be_mended(tmp_path: Path, num_workers: str) -> None:
    photos = write_photos(tmp_path / "photos", 40, size=(64, 64))
    out = tmp_path / "out"
    words = command(photos, out, "--domain", "natural", "--images_per_shard", "20", "--num_workers", num_workers)
    # A shard has some 280 kB; files of 100 kB at most.
    full = run(["bash", "-c", f"ulimit -f 100; exec {shlex.join(words)}"])
    assert full.returncode == 1
    assert "natural-000000.tar cannot be written: File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not [*out.glob("*.tar"), *out.rglob("*.part")]
    again = run(words)
    assert again.returncode == 0, again.stderr
    pack(str(photos), tmp_path / "whole", "natural", images_per_shard=20, num_workers=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    photos = write_photos(tmp_path / "photos", 600)
    (photos / "bad.png").write_bytes(b"x")
    (photos / "00700.png").write_bytes((photos / "00001.png").read_bytes())
    options = ("--domain", "natural", "--images_per_shard", "100", "--num_workers", "2")
    pack(str(photos), tmp_path / "local", "natural", images_per_shard=100, num_workers=1)
    ray = run(command(photos, tmp_path / "ray", *options, "--engine", "ray"))
    assert ray.returncode == 0, ray.stderr
    assert "planned 602 = packed 600 + duplicates 1 + quarantined 1" in ray.stdout
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_ray_is_started_without_telemetry() -> None:
    pytest.importorskip("ray")
    code = (
        "import os; from distill.data.pack import engines; engines._import_ray(); "
        "print(os.environ.get('RAY_USAGE_STATS_ENABLED'))"
    )
    asked = run([sys.executable, "-c", code])
    assert asked.stdout.strip() == "0", asked.stderr


@pytest.mark.slow
def test_ray_tells_the_cause_of_a_failure(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    photos = write_photos(tmp_path / "photos", 3)
    pack(str(photos), tmp_path / "out", "natural", num_workers=1)
    (tmp_path / "out" / "natural-000000.tar").unlink()
    (tmp_path / "out" / ".pack" / "samples.jsonl").write_bytes(b"")
    failed = run(command(photos, tmp_path / "out", "--domain", "natural", "--num_workers", "2", "--engine", "ray"))
    assert failed.returncode == 1
    assert "samples.jsonl is damaged" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_packed_shards_train_the_demo_recipe(tmp_path: Path, demo_recipe: Any, demo_images: Path) -> None:
    # The tars' JSON names each image's domain.
    pack(str(demo_images / "train"), tmp_path / "train", images_per_shard=10, num_workers=1)
    index = build_index(tmp_path / "train")
    assert index.domains == ("chart", "multidisciplinary", "natural", "ocr")
    assert (len(index), len(index.shards)) == (96, 12)
    overrides = (f"--data.train={tmp_path / 'train'}", "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    trained = demo_recipe.run(tmp_path / "run", *overrides)
    assert trained.returncode == 0, trained.stderr
    assert list((tmp_path / "run").rglob("*.ckpt"))
