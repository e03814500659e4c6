"""Ranks with other data or another plan than rank 0's are named, on every rank, before the first step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning import Trainer

from distill.callbacks.resume_point import PlannedData, ResumePoint
from distill.data.datamodule import ShardDataModule
from distill.data.plan_segments import WeightChange
from distill.data.synthetic import synthesize
from distill.errors import ConfigError


class ThreadStrategy:
    """The two collectives that agreement takes, between threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.barrier, self.board = rank, barrier, board

    def _share(self, value: Any) -> dict[int, Any]:
        self.board[self.rank] = value
        self.barrier.wait(60)
        values = dict(self.board)
        self.barrier.wait(60)
        return values

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return self._share(value)[src]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        assert all
        return False not in self._share(decision).values()


def set_up(modules: list[ShardDataModule]) -> list[str]:
    """Return what each rank's set-up raises, empty for nothing."""
    barrier, board = threading.Barrier(len(modules)), {}

    def one(rank: int) -> str:
        module = modules[rank]
        module.setup("fit")
        trainer = SimpleNamespace(
            strategy=ThreadStrategy(rank, barrier, board),
            datamodule=module,
            ckpt_path=None,
            global_rank=rank,
            world_size=len(modules),
        )
        try:
            ResumePoint().setup(cast(Trainer, trainer), cast(Any, None), "fit")
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(modules)) as pool:
        return list(pool.map(one, range(len(modules))))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "heldout"):
        synthesize(folder / split, split=split, images_per_domain=2, img_size_px=64, num_workers=1)
    return folder


def module(images: Path, options: Mapping[str, Any] | None = None) -> ShardDataModule:
    defaults = {"train": str(images / "train"), "global_batch_size": 4, "num_workers": 0}
    return ShardDataModule(**(defaults | dict(options or {})))


def test_ranks_with_the_same_plan_begin(images: Path) -> None:
    assert isinstance(module(images), PlannedData)
    assert set_up([module(images) for _ in range(3)]) == ["", "", ""]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "data.seed is 1, and 0 on rank 0"),
        ({"global_batch_size": 8}, "data.global_batch_size is 8, and 4 on rank 0"),
        ({"shuffle_window": 2}, "data.shuffle_window is 2, and None on rank 0"),
        ({"samples_per_epoch": 4}, "data.samples_per_epoch is 4, and None on rank 0"),
        ({"weights": {"natural": 3, "ocr": 1, "chart": 1, "multidisciplinary": 1}}, "data.weights is "),
        (
            {"weight_changes": [WeightChange(5, {"natural": 3, "ocr": 1, "chart": 1, "multidisciplinary": 1})]},
            "data.weight_changes is ",
        ),
        ({"train": "heldout"}, "data.train differs in "),
        ({"val": "heldout"}, "data.val is "),
    ],
)
def test_every_rank_refuses_where_one_differs_and_says_which_and_in_what(
    images: Path, options: dict[str, Any], named: str
) -> None:
    options = {key: str(images / value) if value == "heldout" else value for key, value in options.items()}
    raised = set_up([module(images), module(images), module(images, options)])
    assert len(set(raised)) == 1
    assert "\n  rank 2 on " in raised[0]
    assert named in raised[0]
    assert "rank 1 on" not in raised[0]


def test_the_shard_that_differs_is_named(images: Path, tmp_path: Path) -> None:
    for shard in (images / "train").glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    (shard,) = tmp_path.glob("natural-*.tar")
    shard.write_bytes(shard.read_bytes() + bytes(512))
    raised = set_up([module(images), module(images, {"train": str(tmp_path)})])
    assert f"data.train differs in 2 place(s), the first being natural/{shard.name}: sha256 " in raised[0]
