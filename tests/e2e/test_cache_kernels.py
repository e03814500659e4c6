"""All who fill a teacher cache run the teachers alike: what the first of them measured stands in the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import engine
from distill.cache_fill import verb
from distill.frozen_teachers import FrozenTeachers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


VIT_SHAPE = {
    "class_path": "teachers.InternViTConfig",
    "init_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "img_size": 56},
}
VIT_TEACHER = {
    "class_path": "teachers.InternViT",
    "init_args": {"weights": "random", "dtype": "float32", "architecture": VIT_SHAPE},
}


def fill_by_vit(demo_recipe, out: Path, *flags: str) -> None:
    overrides = [
        f"--model.teachers={json.dumps({'vit': VIT_TEACHER})}",
        '--model.alignments=[{"student": "vit", "teacher": "vit", "num_layers": 2}]',
        "--model.teacher_micro_batch=null",
        "--model.teacher_cache_gib=0",
        "--data.img_size_px=56",
        "--model.students.vit.init_args.img_size=56",
        "--model.students.vit.init_args.patch_size=14",
    ]
    words = demo_recipe.words(Path("unused"), *overrides)[3:]
    own = [word for word in words if not word.startswith("--trainer")]
    verb.cache(ROOT / "configs" / "demo.yaml", out, overrides=[*own, *flags])


def test_all_who_fill_a_cache_take_the_kernels_and_the_batch_that_it_was_begun_with(
    demo_recipe, tmp_path: Path, monkeypatch
) -> None:
    chosen = {"kernel": "explicit"}
    monkeypatch.setattr(engine, "choose_attention", lambda *_, **__: chosen["kernel"])
    monkeypatch.setattr(engine, "fastest_micro_batch", lambda *_: 4)
    measured = "--model.teacher_micro_batch=auto"
    fill_by_vit(demo_recipe, tmp_path / "explicit", measured)
    manifest = json.loads((tmp_path / "explicit" / "cache.json").read_text())
    kernels = {"attention of teacher vit on cpu in torch.float32": "explicit", "teacher_micro_batch of 8": 4}
    assert manifest["engine"] == {**kernels, "images a teacher sees at a time": 4}
    assert "explicit" not in str(manifest["key"])
    half = Path(shutil.copytree(tmp_path / "explicit", tmp_path / "half"))
    for unit in sorted(half.glob("*/*.safetensors"))[::2]:
        unit.unlink()
    # Another machine, or another moment, would measure something else.
    chosen["kernel"] = "sdpa"
    monkeypatch.setattr(engine, "fastest_micro_batch", lambda *_: 1)
    seen = set()
    forward = FrozenTeachers.forward_hidden_states
    monkeypatch.setattr(
        FrozenTeachers,
        "forward_hidden_states",
        lambda self, *a, **k: seen.add(self.micro_batch) or forward(self, *a, **k),
    )
    fill_by_vit(demo_recipe, half, measured)
    assert seen == {4}
    assert contents(half) == contents(tmp_path / "explicit")
    fill_by_vit(demo_recipe, tmp_path / "sdpa", measured)
    assert records_of(tmp_path / "sdpa") != records_of(half), "the kernels round alike, so that nothing was shown"


def records_of(folder: Path) -> list[bytes]:
    return [load_file(unit)["records"].numpy().tobytes() for unit in sorted(folder.glob("train/*.safetensors"))]
