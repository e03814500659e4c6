"""Fixtures every test shares: fixed seeds, restored global state, a tiny encoder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LONG_FIRST = (
    "test_docs_exports.py",
    "test_teacher_cache.py",
    "test_main_job.py",
    "test_data_ranks.py",
    "test_export_runtimes.py",
    "test_kill_during_save.py",
    "test_planner_memory.py",
    "test_docs_evaluation.py",
    "test_resume_exact.py",
)
"""Files that take a minute or more, longest first; then come whole commands, then all else."""


def start_order(item: pytest.Item) -> tuple[int, bool]:
    """Return what a test's file is sorted by; files of one kind stay in their order."""
    name = item.path.name
    rank = LONG_FIRST.index(name) if name in LONG_FIRST else len(LONG_FIRST)
    return rank, item.path.parent.name != "e2e"


@pytest.hookimpl(tryfirst=True)  # before -m leaves any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, call whole commands slow, and skip, with the reason, what this machine cannot run."""
    items.sort(key=start_order)
    for item in items:
        if item.path.parent.name == "e2e":
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class TinyEncoder(nn.Module):
    """The smallest module that offers `distill.encoder.Encoder`: patches, then residual linear blocks."""

    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, embed_dim: int = 8, depth: int = 3, patch_size: int = 8, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.embed_dim, self.depth, self.patch_size = embed_dim, depth, patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.layer_dims = (embed_dim,) * depth
        self.patch = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.prefix = nn.Parameter(torch.zeros(1, num_prefix_tokens, embed_dim))
        self.blocks = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in range(depth))
        self.forward_count = 0

    def load_weights(self) -> None:
        """Weights are there from construction."""

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        self.forward_count += 1
        scaled = images / 255 if images.dtype == torch.uint8 else images
        patches = self.patch((scaled - 0.5) / 0.5).permute(0, 2, 3, 1)
        prefix = self.prefix.expand(len(images), -1, -1) + patches.mean((1, 2)).unsqueeze(1)
        layers = []
        for block in self.blocks:
            patches, prefix = patches + torch.tanh(block(patches)), prefix + torch.tanh(block(prefix))
            layers.append((prefix, patches))
        return layers[-num_layers:]


@pytest.fixture
def make_encoder() -> Callable[..., TinyEncoder]:
    """Return the class of a tiny encoder."""
    return TinyEncoder


CONSUMERS = ("distill.export.targets", "timm", "open_clip", "transformers.modeling_utils", "transformers.image_utils")


@pytest.fixture(scope="module")
def forked_consumers() -> Iterator[None]:
    """Load exports in processes that are forked from one with timm and transformers, and so take no time to start.

    Consumers that stand in a folder of their own are started anew as always. That the process is a new one is shown by
    the tests that go without this fixture, by those of docs/exports.md first of all.
    """

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        if str(fresh_process.CONSUMERS_ROOT) in env["PYTHONPATH"]:
            return subprocess.run(command, env=env, **options)
        return forked_python.run(command, env=env, preload=CONSUMERS, **options)

    import forked_python  # a program of test_probe_ranks.py imports this file, without that folder

    from distill.export import fresh_process

    with pytest.MonkeyPatch.context() as patch:
        forked = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
        patch.setattr(fresh_process, "subprocess", forked)
        yield


@pytest.fixture(autouse=True)
def fixed_seed_and_restored_state() -> Iterator[None]:
    """Seed torch before each test and restore what a test may change globally.

    One thread: the models are tiny, and threads that spin for a busy core make them many times slower.
    """
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
