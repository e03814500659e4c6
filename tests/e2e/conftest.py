"""The demo recipe at a size that a test can afford: the same teacher, student and loss, on few and small images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked_python
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
IMG_SIZE_PX = 64


class DemoRecipe:
    """Words and environment for `distill fit --config configs/demo.yaml` on small images.

    Targets are by mean_std: one batch of small images has a tenth of the tokens that whitening 320 channels asks for.
    """

    def __init__(self, images: Path) -> None:
        self.images = images
        recipe = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text("utf-8"))
        by_channel = {"standardise": "mean_std", "whitening": 0.0}
        self.alignments = json.dumps([{**each, **by_channel} for each in recipe["model"]["alignments"]])

    def words(self, run: Path, *overrides: str, verb: str = "fit") -> list[str]:
        """Return the words after `distill`; later overrides win."""
        size = str(IMG_SIZE_PX)
        return [
            verb,
            "--config",
            str(ROOT / "configs" / "demo.yaml"),
            f"--trainer.default_root_dir={run}",
            "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=1",
            f"--data.train={self.images / 'train'}",
            f"--data.val={self.images / 'heldout'}",
            f"--data.img_size_px={size}",
            f"--model.students.vit.init_args.img_size={size}",
            f"--model.alignments={self.alignments}",
            "--model.calibration_batches=1",
            *overrides,
        ]

    def command(self, run: Path, *overrides: str, verb: str = "fit") -> list[str]:
        """Return the whole command, for `subprocess` or forked_python.py."""
        return [sys.executable, "-m", "distill", *self.words(run, *overrides, verb=verb)]

    @property
    def environment(self) -> dict[str, str]:
        """One thread a process: a test's models are tiny."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def run(self, run: Path, *overrides: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `distill fit` in a process of its own and return what became of it."""
        return forked_python.run(self.command(run, *overrides), timeout=timeout_s, env=self.environment, cwd=ROOT)


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/ (4 domains x 24 images) and heldout/ (4 x 8) shards of 64 px images."""
    from distill.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("demo_images")
    for split, count in (("train", 24), ("heldout", 8)):
        synthesize(folder / split, split=split, images_per_domain=count, img_size_px=IMG_SIZE_PX, num_workers=1)
    return folder


@pytest.fixture(scope="session")
def demo_recipe(demo_images: Path) -> DemoRecipe:
    """Return the demo recipe on small images."""
    return DemoRecipe(demo_images)
