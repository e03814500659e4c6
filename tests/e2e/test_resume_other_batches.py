"""A run that is resumed within an epoch with another batch size does the rest of the epoch, and no more."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import training_cli
from distill.errors import DataError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

EPOCH = (
    "--data.samples_per_epoch=32",
    "--data.record_samples=true",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.max_epochs=1",
)
"""One epoch of 32 images."""


def fit(demo_recipe: Any, run: Path, *words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training_cli.run(demo_recipe.words(run, *EPOCH, *words))


def batches(global_batch_size: int, accumulated: int) -> tuple[str, str]:
    return f"--data.global_batch_size={global_batch_size}", f"--trainer.accumulate_grad_batches={accumulated}"


def places(run: Path) -> list[int]:
    with (run / "ledger" / "samples-rank-00000.csv").open() as stream:
        return [int(line["index"]) for line in csv.DictReader(stream)]


def validations(run: Path) -> int:
    count = 0
    for file in run.glob("metrics*.csv"):
        with file.open(newline="") as stream:
            count += sum(any(v for k, v in row.items() if k.startswith("val/")) for row in csv.DictReader(stream))
    return count


@pytest.mark.parametrize(
    ("before", "after", "steps_before", "steps"),
    [
        pytest.param((4, 1), (4, 2), 4, 8, id="accumulating two batches after one"),
        pytest.param((4, 2), (4, 1), 5, 8, id="one batch after accumulating two"),
        pytest.param((4, 1), (8, 1), 4, 6, id="a global batch of twice the size"),
        pytest.param((8, 2), (4, 1), 1, 7, id="half a global batch, not accumulated"),
    ],
)
def test_the_rest_of_the_epoch_is_done_once_with_another_batch_size(
    demo_recipe: Any,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    steps_before: int,
    steps: int,
) -> None:
    run = tmp_path / "run"
    fit(demo_recipe, run, *batches(*before), f"--trainer.max_steps={steps_before}")
    done = len(places(run))
    assert done == steps_before * before[0]
    fit(demo_recipe, run, *batches(*after), "--resume=auto")
    assert places(run) == list(range(32))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    assert saved["ShardDataModule"]["consumed"] == 32
    assert saved["ShardDataModule"]["step"] == steps
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    assert validations(run) == 1


def test_an_epoch_is_not_gone_on_with_where_its_images_are_no_whole_number_of_steps(
    demo_recipe: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(demo_recipe, run, *batches(4, 1), "--trainer.max_steps=1")
    with pytest.raises(DataError, match=r"after 4 images of an epoch, with data.global_batch_size = 4 .*with 8 and 1"):
        fit(demo_recipe, run, *batches(8, 1), "--resume=auto")


def test_an_epoch_of_which_nothing_is_left_with_another_batch_size_is_refused(demo_recipe: Any, tmp_path: Path) -> None:
    run, epoch = tmp_path / "run", "--data.samples_per_epoch=36"
    fit(demo_recipe, run, epoch, *batches(4, 1), "--trainer.max_steps=8")
    with pytest.raises(DataError, match=r"what are 4 batches .*the epoch now has 4"):
        fit(demo_recipe, run, epoch, *batches(8, 1), "--resume=auto")


def test_between_epochs_any_batch_size_goes_on(demo_recipe: Any, tmp_path: Path) -> None:
    run, epoch = tmp_path / "run", "--data.samples_per_epoch=36"
    fit(demo_recipe, run, epoch, *batches(4, 1))
    fit(demo_recipe, run, epoch, *batches(8, 2), "--trainer.max_epochs=2", "--resume=auto")
    assert places(run) == list(range(36 + 32))
