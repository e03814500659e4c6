"""The traced graph of `torch.export`: the student's own numbers, any batch, no path of the machine."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export import timm_dir, torch_export
from distill.export.golden import compute_golden
from distill.export.graph_module import trace
from distill.export.reshape import Changes, reshape
from distill.export.run import as_timm_layout
from students import CLIPViT, InternViT, TimmStudent

STRIDES = {"conv_stem": 1}
SIZES: dict[str, Any] = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2}


def make_student(layout: str) -> TimmLayoutEncoder:
    torch.manual_seed(0)
    student: Any = {
        "internvit": lambda: InternViT(weights="random", **SIZES),
        "clip": lambda: CLIPViT(weights="random", **SIZES),
        "timm": lambda: TimmStudent("test_efficientnet", weights="random", img_size=64),
        "strides": lambda: TimmStudent("test_efficientnet", weights="random", img_size=64, strides=STRIDES),
    }[layout]()
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    return as_timm_layout(student.eval())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["internvit", "clip", "timm", "strides"])
def test_the_loaded_program_gives_the_students_numbers_exactly(layout: str, tmp_path: Path) -> None:
    student = make_student(layout)
    torch_export.write(student, tmp_path)
    golden = compute_golden(student, "pt2", 1)
    got = torch_export.consumer_features(tmp_path, "float32", golden.preprocessing.normalise(golden.image), 1)
    for tensor, expected in zip(got.layers[0], golden.layers[-1], strict=True):
        assert torch.equal(tensor, expected)


def test_a_student_with_strides_of_its_own_keeps_them_when_changed_and_is_no_timm_directory() -> None:
    student = make_student("strides")
    changed = reshape(student, Changes(img_size=96))
    assert changed.forward_hidden_states(torch.zeros(1, 3, 96, 96), 1)[0][1].shape[1] == 96 // student.patch_size
    for encoder in (student, changed):
        with pytest.raises(ExportError, match="Export it as onnx, pt2 or executorch"):
            timm_dir.check(encoder)
    timm_dir.check(make_student("timm"))


@pytest.mark.slow
def test_the_program_has_baked_positions_and_tells_no_path_of_this_machine(tmp_path: Path) -> None:
    torch_export.write(make_student("internvit"), tmp_path)
    with zipfile.ZipFile(tmp_path / "encoder.pt2") as file:
        graph = file.read("encoder/models/model.json")
    assert b"upsample" not in graph
    assert b"site-packages" not in graph
    assert str(Path(__file__).parents[2]).encode() not in graph


class Undecided(torch.nn.Module):
    """Branches on a value, which no tracer follows."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values if pixel_values.sum() > 0 else -pixel_values


def test_a_model_that_cannot_be_traced_is_refused_with_another_format() -> None:
    with pytest.raises(ExportError, match=r"cannot trace this student for the pt2 export: .*Export it as timm instead"):
        trace(Undecided(), 8, batch=None, format="pt2")
