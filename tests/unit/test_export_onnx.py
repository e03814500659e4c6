"""The ONNX graphs, run by ONNX Runtime in this process: opset, batch, precision, and what they must not hold."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export import graph_module, onnx_graph
from distill.export.compare import compare_features
from distill.export.golden import compute_golden
from distill.export.run import as_timm_layout
from students import CLIPViT, InternViT, TimmStudent

onnx = pytest.importorskip("onnx", reason="install encoder-distill[onnx]")
ort = pytest.importorskip("onnxruntime", reason="install encoder-distill[onnx]")

SIZES: dict[str, Any] = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2}
LAYOUTS = ["internvit", "clip", "timm"]


def make_student(layout: str) -> TimmLayoutEncoder:
    torch.manual_seed(0)
    student: Any = {
        "internvit": lambda: InternViT(weights="random", **SIZES),
        "clip": lambda: CLIPViT(weights="random", **SIZES),
        "timm": lambda: TimmStudent("test_efficientnet", weights="random", img_size=64),
    }[layout]()
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    return as_timm_layout(student.eval())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every layout, written once; translating takes seconds."""
    root = tmp_path_factory.mktemp("onnx")
    for layout in LAYOUTS:
        (root / layout).mkdir()
        onnx_graph.write(make_student(layout), root / layout)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_runtime_gives_the_encoders_tokens_within_each_files_bound(exports: dict[str, Path], layout: str) -> None:
    golden = compute_golden(make_student(layout), "onnx", 1)
    pixels = golden.preprocessing.normalise(golden.image)
    present = onnx_graph.variants(exports[layout])
    assert [variant.name for variant in present][:3] == ["float32", "float32-opset18", "float16"]
    for variant in present:
        got = onnx_graph.consumer_features(exports[layout], variant.name, pixels, 1)
        ((prefix, patches),) = got.layers
        answers = {f"{variant.name}.0.prefix": prefix, f"{variant.name}.0.patches": patches}
        compare_features(golden, answers, variant.name, variant.bound, got.consumer)


@pytest.mark.slow
def test_names_opsets_and_the_free_batch_are_those_of_the_contract(exports: dict[str, Path]) -> None:
    for file, opset in ((onnx_graph.FLOAT32_FILE, 20), (onnx_graph.OPSET18_FILE, 18), (onnx_graph.FLOAT16_FILE, 20)):
        model = onnx.load(exports["clip"] / file)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
        session = ort.InferenceSession(exports["clip"] / file)
        assert [(item.name, item.type) for item in session.get_inputs()] == [("pixel_values", "tensor(float)")]
        assert isinstance(session.get_inputs()[0].shape[0], str)
        assert session.get_inputs()[0].shape[1:] == [3, 56, 56]
        assert [item.name for item in session.get_outputs()] == ["patch_tokens", "prefix_tokens"]
        outputs = session.run(None, {"pixel_values": np.zeros((13, 3, 56, 56), np.float32)})
        assert [output.shape for output in outputs] == [(13, 16, 32), (13, 1, 32)]
        assert {output.dtype.name for output in outputs} == {"float32"}


@pytest.mark.slow
def test_positions_are_baked_and_no_path_of_this_machine_is_told(exports: dict[str, Path]) -> None:
    for layout in LAYOUTS:
        for path in exports[layout].glob("*.onnx"):
            assert "Resize" not in {node.op_type for node in onnx.load(path).graph.node}
            content = path.read_bytes()
            assert b"site-packages" not in content
            assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.slow
def test_lower_precision_is_in_the_file_and_only_matrix_products_are_int8(exports: dict[str, Path]) -> None:
    kind = onnx.TensorProto
    kinds = {
        file: {item.name: item.data_type for item in onnx.load(exports["internvit"] / file).graph.initializer}
        for file in (onnx_graph.FLOAT16_FILE, onnx_graph.INT8_FILE)
    }
    assert kind.FLOAT16 in kinds[onnx_graph.FLOAT16_FILE].values()
    assert kind.INT8 in kinds[onnx_graph.INT8_FILE].values()
    operators = {node.op_type for node in onnx.load(exports["internvit"] / onnx_graph.INT8_FILE).graph.node}
    assert {"MatMulInteger", "Conv"} <= operators
    assert "ConvInteger" not in operators


@pytest.mark.slow
def test_a_student_without_linear_layers_has_no_int8_file_and_says_why(exports: dict[str, Path]) -> None:
    assert not (exports["timm"] / onnx_graph.INT8_FILE).exists()
    left_out = json.loads((exports["timm"] / "preprocessor.json").read_text())["left_out"]
    assert left_out == {onnx_graph.INT8_FILE: "this student has no linear layer, and only those are quantised"}
    assert json.loads((exports["clip"] / "preprocessor.json").read_text())["outputs"] == {
        "patch_tokens": ["batch", 16, 32],
        "prefix_tokens": ["batch", 1, 32],
    }


@pytest.mark.slow
def test_an_int8_graph_too_far_from_float32_is_left_out_with_its_cosine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student("internvit")
    with torch.no_grad():
        for block in student.model.blocks:  # type: ignore[attr-defined]
            block.norm1.weight[0], block.norm2.weight[0] = 200.0, 200.0  # outlier channels, which int8 cannot hold
    with caplog.at_level(logging.WARNING):
        onnx_graph.write(student, tmp_path)
    assert [variant.name for variant in onnx_graph.variants(tmp_path)] == ["float32", "float32-opset18", "float16"]
    reason = json.loads((tmp_path / "preprocessor.json").read_text())["left_out"][onnx_graph.INT8_FILE]
    assert "lowest cosine with float32 is" in reason
    assert reason in caplog.text


class BatchMean(nn.Module):
    """Mixes the images of a batch, as a graph with a wrong reshape would."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = pixels.flatten(2).mT.unflatten(1, (4, 4))
        return tokens[:, 0, :1], tokens + tokens.mean(0, keepdim=True)


def test_a_graph_whose_images_depend_on_their_batch_is_refused() -> None:
    pixels = torch.randn(1, 3, 4, 4)
    module = BatchMean()
    with pytest.raises(ExportError, match=r"image 0 of a batch of 2 other features than alone"):
        graph_module.check_batches(module(pixels), module, pixels, 0.9999, "it")


def test_students_beyond_the_size_of_one_file_are_refused_with_another_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match=r"GB in float32; an ONNX file ends at 2 GB\. Export it as pt2"):
        onnx_graph.check(make_student("clip"))


def test_tracing_leaves_the_callers_random_numbers_alone() -> None:
    student = make_student("internvit")
    before = torch.random.get_rng_state()
    graph_module.build_graph_module(student)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_a_graph_that_fails_only_in_batches_is_left_out_and_the_others_stay(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exports["clip"], tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(onnx_graph.BATCH_COSINES, "int8", 1.5)  # no cosine reaches it
    removed = onnx_graph._remove_distant(tmp_path, onnx_graph._golden_pixels(make_student("clip")))
    assert list(removed) == [onnx_graph.INT8_FILE]
    assert "of a batch of 2 other features than alone" in removed[onnx_graph.INT8_FILE]
    assert [variant.name for variant in onnx_graph.variants(tmp_path)] == ["float32", "float32-opset18", "float16"]
