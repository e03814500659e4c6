"""kill -9 at any instant of a save: a complete checkpoint verifies and loads, and the leftovers are swept."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import ForkedPython

from distill.checkpoint import newest_verified, read_checkpoint
from distill.checkpoint_files import LEFTOVER, claimed_step, sweep, verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50
# One process imports once; each round is a fork of it, which saves for ever until it is killed. Steps only grow.
SAVER = """
import os, sys, torch
from pathlib import Path
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
torch.set_num_threads(1)
path = Path(sys.argv[1]) / "last.ckpt"
io = AtomicCheckpointIO()
tensor = torch.zeros(5_000_000)
for line in sys.stdin:
    first = int(line)
    pid = os.fork()
    if pid == 0:
        step = first
        while True:
            tensor.fill_(step)
            io.save_checkpoint({"state_dict": {"a": tensor}, "global_step": step, "epoch": 0}, path)
            os.write(1, b".")  # one save is complete
            step += 1
    print("pid", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def wait_for(stream: int, wanted: bytes, timeout_s: float = 120) -> bytes:
    read, deadline = b"", time.monotonic() + timeout_s
    while wanted not in read:
        assert time.monotonic() < deadline, read
        read += os.read(stream, 1)
    return read


def test_after_each_of_50_kills_during_saves_a_checkpoint_verifies_and_loads(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert saver.stdin
    assert saver.stdout
    step, leftovers, saved, save_s = 0, 0, 0, 0.0
    try:
        for number in range(KILLS):
            saver.stdin.write(f"{step + 1}\n".encode())
            out = wait_for(saver.stdout.fileno(), b"pid ")
            pid = int(wait_for(saver.stdout.fileno(), b"\n"))
            if step == 0:
                begun = time.monotonic()
                out += wait_for(saver.stdout.fileno(), b"..")
                save_s = (time.monotonic() - begun) / 2
            time.sleep(rng.uniform(0, 2.5 * save_s))
            os.kill(pid, signal.SIGKILL)
            out += wait_for(saver.stdout.fileno(), b"dead\n")
            saved += out.count(b".")
            found, reasons = newest_verified(tmp_path)
            place = f"kill {number} of seed {seed}"
            assert found is not None, (place, reasons)
            assert verify(found).global_step >= step, (place, reasons)
            step = verify(found).global_step
            assert (read_checkpoint(found)["state_dict"]["a"] == step).all(), place
            leftovers += len(sweep(tmp_path))
            assert not [file for file in tmp_path.iterdir() if LEFTOVER.match(file.name)], place
            assert len(list(tmp_path.iterdir())) <= 4, place
    finally:
        saver.stdin.close()
        saver.wait(60)
        saver.stdout.close()
    assert leftovers > KILLS // 10  # else the kills did not meet saves
    assert saved > KILLS // 10


def test_a_file_size_limit_ends_the_save_with_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from distill.callbacks.checkpoint_io import AtomicCheckpointIO
from distill.errors import WeightsError
path = Path({str(tmp_path)!r}) / "last.ckpt"
io = AtomicCheckpointIO()
io.save_checkpoint({{"state_dict": {{"a": torch.zeros(1000)}}, "global_step": 1}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
io.save_checkpoint({{"state_dict": {{"a": torch.zeros(1_000_000)}}, "global_step": 2}}, path)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 1
    assert f"{tmp_path}/last.ckpt of about 4,000,000 bytes could not be written" in result.stderr
    assert verify(tmp_path / "last.ckpt").global_step == 1
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.manifest.json"}


def test_a_killed_fit_resumed_by_auto_ends_with_the_weights_of_one_that_was_not_killed(
    demo_recipe: Any, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = killed / "checkpoints" / "last.ckpt"
    often = "--trainer.callbacks+=" + json.dumps(
        {
            "class_path": "distill.callbacks.last_checkpoint.LastCheckpoint",
            "init_args": {"dirpath": str(last.parent), "every_n_steps": 1},
        }
    )
    course = ("--trainer.max_epochs=2", "--model.students.vit.init_args.drop_path_rate=0.3", "--resume=auto")
    assert demo_recipe.run(whole, *course).returncode == 0
    process = ForkedPython(
        demo_recipe.command(killed, *course, often),
        env=demo_recipe.environment,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while claimed_step(last) < 5:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert claimed_step(last) < 24
    # A second kill, of which bits rotted: the file before is taken, and said so.
    os.truncate(last, last.stat().st_size - 1)
    # The one that goes on is a new interpreter: nothing of the first can be in its memory, not even the hash seed.
    result = subprocess.run(
        demo_recipe.command(killed, *course),
        env=demo_recipe.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert f"Passed over: {last} is damaged" in result.stderr
    assert f"Going on from {last.with_name('previous.ckpt')}, step " in result.stderr
    one, two = read_checkpoint(whole / "checkpoints" / "last.ckpt"), read_checkpoint(last)
    assert one["global_step"] == two["global_step"] == 24
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
