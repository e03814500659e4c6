"""Two processes over one data set: together they hold every image once, in order; one process's trouble ends both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked_python
import pytest

from distill.probe.ranks import alone, is_first, rank_and_size, share_of

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
import torch
from distill.errors import DataError
from distill.probe.features import extract
from distill.probe.ranks import is_first, process_group
sys.path.insert(0, "tests")
from conftest import TinyEncoder

class Images:
    def __len__(self):
        return 7
    def __getitem__(self, row):
        if row in BAD:
            raise DataError(f"image {row} is damaged.")
        return {"image": torch.full((3, 32, 32), 9 * row, dtype=torch.uint8), "label": row, "domain": 0, "row": row}

BAD = json.loads(sys.argv[1])
torch.manual_seed(0)
encoder = TinyEncoder()
alone = extract(encoder, Images(), batch_size=2, token_grids=[(2, 2)]) if not BAD else None
with process_group():
    together = extract(encoder, Images(), batch_size=2, token_grids=[(2, 2)])
    if is_first() and alone is not None:
        assert together.rows.tolist() == list(range(7)), together.rows
        assert together.labels.tolist() == list(range(7))
        torch.testing.assert_close(together.pooled, alone.pooled)
        torch.testing.assert_close(together.tokens[2, 2], alone.tokens[2, 2])
    print(len(together.rows), together.num_bad)
"""


def run_two(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(forked_python.run, command, env={**common, "RANK": str(rank)}, cwd=ROOT, timeout=240)
            for rank in range(2)
        ]
        return [rank.result() for rank in ranks]


@pytest.mark.slow
def test_two_processes_hold_every_image_once_and_in_order() -> None:
    first, second = run_two("[]")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.split()[-2:] == ["7", "0"]
    assert second.stdout.split()[-2] == "4"  # its own share: rows 3 to 6


@pytest.mark.slow
def test_too_many_bad_images_of_one_process_end_both() -> None:
    first, second = run_two("[5, 6, 4]")
    assert first.returncode == second.returncode == 1
    assert "other process(es) of this probe could not go on" in first.stderr
    assert "cannot be decoded" in second.stderr


def test_one_process_takes_everything() -> None:
    assert (rank_and_size(), is_first(), list(share_of(3))) == ((0, 1), True, [0, 1, 2])
    with alone():
        assert rank_and_size() == (0, 1)
