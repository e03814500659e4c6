"""What a plan counts of teachers that are spread over devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from distill.alignment import AlignmentConfig
from distill.engine import EngineConfig
from distill.errors import ConfigError
from distill.planner.estimate import plan_memory, step_costs
from distill.planner.recipe import Recipe
from distill.planner.sharding import share_of, spread_teachers
from distill.task import DistillationTask
from students import InternViT as Student
from teachers import InternViT as Teacher
from teachers import InternViTConfig, TimmTeacher

ROOT = Path(__file__).resolve().parents[2]
SIDE = 56
# The same as for whole teachers: allocator, buffers of the transport, rounding to pages.
TOLERANCE = 0.15


def recipe(sharding: str, devices: int, teacher: nn.Module | None = None) -> Recipe:
    config = InternViTConfig(embed_dim=64, depth=6, num_heads=2, mlp_dim=256, img_size=SIDE)
    task = DistillationTask(
        {"big": teacher or Teacher("random", config, dtype="bfloat16")},
        {"small": Student("random", img_size=SIDE, embed_dim=32, depth=2, num_heads=2)},
        [AlignmentConfig("small", "big", num_layers=2)],
        engine=EngineConfig(teacher_sharding=sharding),
        teacher_micro_batch=2,
    )
    data: Any = SimpleNamespace(img_size_px=SIDE, global_batch_size=4 * devices)
    return Recipe(task, data, {"devices": devices}, {})


@pytest.mark.parametrize(("device", "copies"), [("cuda", 2), ("cpu", 3)])
def test_a_device_holds_its_rows_of_all_tensors_and_copies_of_the_largest_block(device: str, copies: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 10, bias=False)
            self.blocks = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(3))

    share = share_of(Net(), world_size=4, device=device)
    # 10 rows over 4 devices are 3 rows on each, 2 of them padding in all; 8 rows are 2.
    assert share.own == 4 * (3 * 4 + 3 * 2 * 6)
    assert share.gathered == 4 * (12 * 4 + copies * 8 * 6)


@pytest.mark.parametrize(
    ("sharding", "devices", "is_spread"), [("blocks", 4, True), ("blocks", 1, False), ("none", 4, False)]
)
def test_a_plan_counts_a_share_of_a_sharded_teacher_in_each_phase(sharding: str, devices: int, is_spread: bool) -> None:
    planned = recipe(sharding, devices)
    costs = step_costs(planned, "cpu", "32-true")
    spread = spread_teachers(planned, costs, "cpu")
    whole = costs[0].memory["teacher"]["weights of teacher big"]
    assert whole > 2 * 6 * 12 * 64**2 * 0.9  # bfloat16, 12 D^2 a block
    if not is_spread:
        assert spread == costs
        return
    share = share_of(planned.task.teachers["big"], devices, "cpu")
    assert share.own == pytest.approx(whole / devices, rel=0.05)
    for phase, gathered in {"teacher": share.gathered, "forward": 0, "backward": 0}.items():
        before, after = costs[0].memory[phase].total(), spread[0].memory[phase].total()
        assert after == before - whole + share.own + gathered
    assert spread[0].before_backward.total() == costs[0].before_backward.total() - whole + share.own


def test_a_larger_batch_fits_beside_a_sharded_teacher() -> None:
    planned = recipe("blocks", 4)
    costs = step_costs(planned, "cpu", "32-true")
    memory_gib = 1.05 * plan_memory(planned, costs, None, "cpu").peak_bytes / 2**30
    whole, spread = (
        plan_memory(planned, held, memory_gib, "cpu") for held in (costs, spread_teachers(planned, costs, "cpu"))
    )
    assert spread.largest_batch > whole.largest_batch
    assert any("this device's rows" in purpose for purpose in spread.parts)


def test_a_teacher_that_cannot_be_sharded_is_refused_before_anything_is_spent() -> None:
    planned = recipe("blocks", 4, TimmTeacher("test_vit", weights="random", img_size=SIDE - 8))
    with pytest.raises(ConfigError, match=r"model\.engine\.teacher_sharding is blocks, .* the teacher 'big', has no"):
        spread_teachers(planned, (None, None), "cpu")


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from teachers import InternViT, InternViTConfig

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
config = InternViTConfig(embed_dim=512, depth=8, num_heads=8, mlp_dim=2048, img_size=56)
images = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
tiny = InternViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, img_size=56)
small = InternViT("random", tiny, dtype="float32")
teacher = InternViT("random", config, dtype="float32")
mesh = init_device_mesh("cpu", (2,))


def held(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# What libraries take for themselves at their first call is there before.
small.shard(mesh)
small.load_weights()
small.forward_hidden_states(images, 1)
before = held("VmRSS")
teacher.shard(mesh)
teacher.load_weights()
own = held("VmRSS") - before
Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew
for _ in range(2):
    teacher.forward_hidden_states(images, 1)
print(json.dumps([own, held("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads this process's memory from /proc")
def test_the_share_is_within_15_percent_of_what_two_real_processes_hold(tmp_path: Path) -> None:
    config = InternViTConfig(embed_dim=512, depth=8, num_heads=8, mlp_dim=2048, img_size=56)
    share = share_of(Teacher("random", config, dtype="float32"), 2, "cpu")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    for rank in ranks:
        text, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0
        assert [share.own, share.own + share.gathered] == pytest.approx(
            json.loads(text.splitlines()[-1]), rel=TOLERANCE
        )
