"""A large teacher is read into memory once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import teachers.progress as progress_module
from teachers import InternViTConfig
from teachers.progress import file_progress
from teachers.weights import INDEX_NAME, SINGLE_NAME, SafetensorsCheckpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = InternViTConfig(embed_dim=1024, depth=16, num_heads=8, mlp_dim=4096)

LOAD = """
import json, re, resource, sys
from pathlib import Path
from teachers import InternViT, InternViTConfig

teacher = InternViT(sys.argv[1], InternViTConfig(**json.loads(sys.argv[2])), dtype="bfloat16")
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
teacher.load_weights()
# Not ru_maxrss, which a process inherits from whoever started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"extra": peak - before, "weights": sum(p.nbytes for p in teacher.parameters())}))
"""


def write_release(folder: Path, shards: int) -> None:
    """Write random bfloat16 weights of `CONFIG` as a release has them."""
    from dataclasses import asdict

    from teachers import InternViT

    model = InternViT("random", CONFIG, dtype="bfloat16")
    tensors = {name: torch.empty(p.shape, dtype=torch.bfloat16).normal_() for name, p in model.named_parameters()}
    release = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 4096}
    release |= {"image_size": 448, "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}
    (folder / "config.json").write_text(json.dumps(release))
    (folder / "fields.json").write_text(json.dumps(asdict(CONFIG)))
    if shards == 1:
        save_file(tensors, folder / SINGLE_NAME)
        return
    names = list(tensors)
    files = {name: f"model-{place * shards // len(names):05d}.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": files}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads this process's memory from /proc")
@pytest.mark.parametrize("shards", [1, 4])
def test_a_release_of_400_mb_takes_less_than_1_3_times_its_weights(tmp_path: Path, shards: int) -> None:
    write_release(tmp_path, shards)
    fields = (tmp_path / "fields.json").read_text()
    (tmp_path / "fields.json").unlink()
    command = [sys.executable, "-c", LOAD, str(tmp_path), fields]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["weights"] > 390e6
    assert figures["extra"] < 1.3 * figures["weights"], figures


def test_a_file_mapped_in_parts_gives_every_tensor_once_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.weights._MAPPED_BYTES", 100)
    tensors = {f"t{number}": torch.full((30,), float(number)) for number in range(5)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    read = {name: tensor.clone() for name, tensor in checkpoint.tensors(tensors)}
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_bar_shows_on_a_terminal_for_more_than_a_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module.Console, "is_terminal", True)
    assert not file_progress(4).disable
    assert file_progress(3).disable


def test_no_bar_shows_where_no_terminal_is() -> None:
    assert file_progress(100).disable
