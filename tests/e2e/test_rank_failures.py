"""One rank of `distill fit` fails: all end in bounded time, with its cause printed and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # pytest imports each test file by itself
RankProcesses = import_module("rank_processes").RankProcesses
DemoRecipe = Any  # the class of the fixture in conftest.py

pytestmark = pytest.mark.slow
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
BOUND_S = 240
"""Far below the 600 s that a collective operation waits, and far above what these runs take on a busy machine."""


def fail_at(how: str, rank: int) -> list[str]:
    """Return words that let one of a run's processes fail at its third step."""
    arguments = {"how": how, "step": 3, "rank": rank}
    return [
        *TWO_RANKS,
        "--trainer.num_sanity_val_steps=0",
        "--trainer.callbacks+=faults.FailAt",
        *(f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()),
    ]


def failure(run: Path, rank: int) -> dict[str, Any]:
    """Return what a run keeps about a rank's failure."""
    return json.loads((run / "failures" / f"rank-{rank}.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_both_and_both_name_it(
    demo_recipe: DemoRecipe, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    ranks = RankProcesses(demo_recipe.words(run, *fail_at("raise", rank)), 2, tmp_path / "log")
    assert ranks.finish(BOUND_S) == [1, 1], ranks.text()
    own, other = failure(run, rank), failure(run, 1 - rank)
    assert (own["cause"], own["step"], own["first"]) == ("ValueError: the fault of this test", 3, "")
    assert "faults.py" in own["traceback"]
    assert other["first"] == f"rank {rank} failed first: ValueError: the fault of this test"
    assert f"error: rank {1 - rank} ends because rank {rank} failed first: ValueError" in ranks.text()


def test_a_killed_rank_0_ends_the_other_which_keeps_word_of_it(demo_recipe: DemoRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = RankProcesses(demo_recipe.words(run, *fail_at("SIGKILL", 0)), 2, tmp_path / "log")
    assert ranks.finish(BOUND_S) == [-9, 1], ranks.text()
    assert "is gone" in failure(run, 0)["cause"]
    assert failure(run, 1)["first"].startswith("rank 0 failed first: its process")


@pytest.mark.parametrize("how", ["SIGSEGV", "exit"])
def test_a_rank_that_crashes_or_leaves_without_a_word_ends_the_run(
    demo_recipe: DemoRecipe, tmp_path: Path, how: str
) -> None:
    run = tmp_path / "run"
    words = [*fail_at(how, 1), "--trainer.callbacks+=distill.callbacks.failure.FailureReports"]
    ranks = RankProcesses(
        demo_recipe.words(run, *words, "--trainer.callbacks.heartbeat_timeout_s=3"), 2, tmp_path / "log"
    )
    assert ranks.finish(BOUND_S) == [1, -11 if how == "SIGSEGV" else 0], ranks.text()
    assert failure(run, 0)["first"].startswith("rank 1 failed first")


def test_lightnings_own_launcher_ends_with_1_and_the_cause_when_a_rank_it_started_is_killed(
    demo_recipe: DemoRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        demo_recipe.command(run, *fail_at("SIGKILL", 1)),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        cwd=HERE.parents[1],
        env={**demo_recipe.environment, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 1, done.stderr
    assert failure(run, 1)["cause"] == "its process was ended by signal 9"
    assert "rank 1 failed first: its process was ended by signal 9" in done.stderr


def test_under_torchrun_a_failing_rank_ends_the_run_and_both_name_it(demo_recipe: DemoRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distill"]
    done = subprocess.run(
        [*launcher, *demo_recipe.words(run, *fail_at("raise", 1))],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        cwd=HERE.parents[1],
        env={**demo_recipe.environment, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 1, done.stderr
    assert failure(run, 1)["cause"] == "ValueError: the fault of this test"


def test_two_ranks_skip_the_same_step_when_one_meets_a_value_that_is_not_finite(
    demo_recipe: DemoRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = {"what": "teacher", "steps": "[2]", "rank": 1}
    words = ["--trainer.max_steps=6", "--trainer.num_sanity_val_steps=0", "--model.teacher_cache_gib=0"]
    words += ["--trainer.callbacks+=faults.SpoilAt"]
    words += [f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()]
    ranks = RankProcesses(demo_recipe.words(run, *TWO_RANKS, *words), 2, tmp_path / "log")
    assert ranks.finish(BOUND_S) == [0, 0], ranks.text()
    record = json.loads((run / "non_finite" / "rank-1.jsonl").read_text())
    assert record["step"] == 2
    assert record["not_finite"][0] == "teacher efficientnet_lite0"
    (bad,) = [sample for sample in record["samples"] if "not_finite_from" in sample]
    assert ".tar" in bad["sample"]
    assert "1 skipped so far" in ranks.text()
