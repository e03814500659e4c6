"""Graph and mmproj exports, published by the verb's own path and run by the runtimes they are for.

ExecuTorch, libmtmd and OpenVINO live in folders that scripts/consumers.sh and scripts/build_llama.sh fill; what is not
there is skipped with the command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.errors import ConfigError, ExportError
from distill.export import fresh_process
from distill.export.fresh_process import CONSUMERS_ROOT
from distill.export.golden import compute_golden, draw_image, read_golden, write_golden
from distill.export.run import Exported, export_encoder
from distill.export.targets import find_target
from distill.export.verify import verify_export
from students import InternViT

pytestmark = pytest.mark.usefixtures("forked_consumers")

SIZES: dict[str, Any] = {"img_size": 56, "embed_dim": 32, "depth": 4, "num_heads": 2}
LLM_WIDTH = 64
TIMEOUT_S = 600
RUNTIME_TOLERANCE = 1e-3  # features of these noise weights reach 26: 1e-4 in proportion, as the export is held to
TORCH_TOLERANCE = 1e-4  # the same operators, after a normalisation in float64


def make_student() -> Any:
    torch.manual_seed(0)
    student = InternViT(weights="random", **SIZES)
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    return student.eval()


def require(package: str, folder: str, command: str) -> None:
    if not (CONSUMERS_ROOT / folder / package).is_dir():
        pytest.skip(f"{package} is not in .consumers: {command}")


def run_alone(code: str, directory: Path, folder: str | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Run code that ends with `features` in a process that cannot import this project; return them."""
    photo = directory.parent / "photo.jpg"
    Image.fromarray(draw_image(90, 70)).save(photo)
    head = f"import sys\nimport numpy\ndirectory = {str(directory)!r}\n"
    answer = photo.with_name("features.npy")
    tail = f"\nassert not {{'distill', 'students'}} & set(sys.modules)\nnumpy.save({str(answer)!r}, features)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if folder is not None:
        environment["PYTHONPATH"] = str(CONSUMERS_ROOT / folder)
    words = [sys.executable, "-P", "-c", head + code + tail]
    done = subprocess.run(words, cwd=photo.parent, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return np.load(answer)


def students_features(photo: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    image = Image.open(photo).convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0)
        return make_student().forward_hidden_states(pixels, 1)[-1][1].flatten(1, 2).numpy()


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("onnxscript", reason="install encoder-distill[onnx]")
    return export_encoder(make_student(), "onnx", tmp_path_factory.mktemp("onnx") / "export")


@pytest.mark.slow
def test_onnx_is_published_with_size_cosine_and_latency_of_every_precision(onnx_export: Exported) -> None:
    manifest = json.loads((onnx_export.directory / "manifest.json").read_text())
    proofs = {proof["name"]: proof for proof in manifest["verification"]["variants"]}
    assert list(proofs) == ["float32", "float32-opset18", "float16", "int8"]
    assert all(proof["size_bytes"] > 0 and proof["latency_ms"] > 0 for proof in proofs.values())
    assert proofs["float16"]["size_bytes"] < 0.7 * proofs["float32"]["size_bytes"]
    assert proofs["float32"]["worst_difference"] <= RUNTIME_TOLERANCE
    assert 0.98 <= proofs["int8"]["min_cosine"] < 1
    assert manifest["verification"]["layers"] == [-1]
    card = (onnx_export.directory / "README.md").read_text()
    assert "encoder_int8.onnx" in card


@pytest.mark.slow
def test_the_onnx_cards_lines_give_the_students_features_without_torch_or_this_project(onnx_export: Exported) -> None:
    code = find_target("onnx").loading_code() + "\nassert 'torch' not in sys.modules\n"
    features = run_alone(code, onnx_export.directory)
    expected = students_features(onnx_export.directory.parent / "photo.jpg")
    np.testing.assert_allclose(features, expected, rtol=0, atol=RUNTIME_TOLERANCE)


OPENVINO_CODE = """
import openvino
from safetensors.numpy import load_file
core = openvino.Core()
model = core.compile_model(f"{directory}/encoder.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
pixels = load_file("pixels.safetensors")["pixels"]
features = model([pixels])["patch_tokens"]
"""


@pytest.mark.slow
def test_openvino_runs_the_same_file_at_another_batch_size(onnx_export: Exported) -> None:
    require("openvino", "openvino", "bash scripts/consumers.sh openvino")
    golden = read_golden(onnx_export.directory)
    pixels = golden.preprocessing.normalise(golden.image)
    batch = torch.cat([pixels.roll(9, dims=-1), pixels, pixels.flip(-1)])
    save_file({"pixels": batch.contiguous()}, onnx_export.directory.parent / "pixels.safetensors")
    features = run_alone(OPENVINO_CODE, onnx_export.directory, "openvino")
    expected = golden.layers[-1][1].flatten(1, 2).numpy()
    assert features.shape == (3, 16, 32)
    np.testing.assert_allclose(features[1:2], expected, rtol=0, atol=RUNTIME_TOLERANCE)
    assert np.abs(features[0] - expected[0]).max() > 0.1


@pytest.fixture(scope="module")
def pt2_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_encoder(make_student(), "pt2", tmp_path_factory.mktemp("pt2") / "export")


@pytest.mark.slow
def test_pt2_is_published_without_a_difference_and_runs_without_this_project(pt2_export: Exported) -> None:
    exported = pt2_export
    assert exported.verification.worst_difference == 0.0
    code = find_target("pt2").loading_code() + "\nfeatures = features.detach().numpy()\n"
    features = run_alone(code, exported.directory)
    np.testing.assert_allclose(
        features, students_features(exported.directory.parent / "photo.jpg"), rtol=0, atol=TORCH_TOLERANCE
    )


@pytest.fixture(scope="module")
def executorch_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    require("executorch", "executorch", "bash scripts/consumers.sh executorch")
    return export_encoder(make_student(), "executorch", tmp_path_factory.mktemp("executorch") / "export")


@pytest.mark.slow
def test_executorch_is_published_and_its_runtime_gives_the_students_features(executorch_export: Exported) -> None:
    (proof,) = executorch_export.verification.variants
    assert proof.worst_difference <= (proof.tolerance or 0.0)
    assert "ExecuTorch 1.5.1" in executorch_export.verification.consumer
    preprocessor = json.loads((executorch_export.directory / "preprocessor.json").read_text())
    assert preprocessor["input"]["shape"] == [1, 3, 56, 56]


def write_projector(path: Path) -> Path:
    torch.manual_seed(1)
    shapes = {"mlp1.0": (128,), "mlp1.1": (LLM_WIDTH, 128), "mlp1.3": (LLM_WIDTH, LLM_WIDTH)}
    weights = {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) * 0.1 for name, shape in shapes.items()}
    save_file(weights, path)
    return path


@pytest.mark.slow
def test_gguf_is_published_after_libmtmd_gave_the_projected_features_in_a_fresh_process(tmp_path: Path) -> None:
    require("llama_cpp", "llama-cpp", "bash scripts/build_llama.sh")
    pytest.importorskip("gguf", reason="install encoder-distill[gguf]")
    projector = write_projector(tmp_path / "projector.safetensors")
    exported = export_encoder(make_student(), "gguf", tmp_path / "export", companion=projector)
    assert [proof.name for proof in exported.verification.variants] == ["f16", "q8_0"]
    assert all(proof.min_cosine >= 0.9999 for proof in exported.verification.variants)
    assert exported.verification.consumer == "libmtmd of llama-cpp-python 0.3.36"
    golden = load_file(exported.directory / "golden.safetensors")
    assert golden["hidden_state_-1.patches"].shape == (1, 2, 2, LLM_WIDTH)


@pytest.mark.slow
def test_gguf_with_the_class_tokens_position_first_is_refused_and_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("llama_cpp", "llama-cpp", "bash scripts/build_llama.sh")
    monkeypatch.setattr("distill.export.gguf_file.llama_names", _class_row_first)
    projector = write_projector(tmp_path / "projector.safetensors")
    with pytest.raises(ExportError, match=r"have a cosine of .*at least 0\.9999 .*the gguf export is not published"):
        export_encoder(make_student(), "gguf", tmp_path / "export", companion=projector)
    assert [path.name for path in tmp_path.iterdir()] == ["projector.safetensors"]


def _class_row_first(*arguments: Any) -> dict[str, torch.Tensor]:
    from distill.export.mmproj import llama_names

    named = llama_names(*arguments)
    return {**named, "v.position_embd.weight": named["v.position_embd.weight"].roll(1, dims=0)}


@pytest.mark.parametrize(
    ("format", "command"),
    [("executorch", "bash scripts/consumers.sh executorch"), ("gguf", r"bash scripts/build_llama\.sh")],
)
def test_a_runtime_that_is_not_built_is_named_with_the_command_that_builds_it(
    format: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "CONSUMERS_ROOT", tmp_path)
    # Another test of this process may have imported the runtime.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if ".consumers" not in place])
    for package in find_target(format).REQUIRES:
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ConfigError, match=rf"which is not installed\. Run: .*{command}"):
        fresh_process.require_consumer(find_target(format))


def exchange_blocks(student: Any) -> Any:
    """Return the student with its first two blocks in each other's place."""
    student.model.blocks[0], student.model.blocks[1] = student.model.blocks[1], student.model.blocks[0]
    return student


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def give_another_mean(directory: Path) -> None:
    file = directory / "preprocessor.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.5, 0.5, 0.5]}))


def exchange_onnx_weights(directory: Path) -> None:
    """Give the two largest weights of one shape each other's place, as two blocks exchanged would."""
    import onnx

    model = onnx.load(directory / "encoder.onnx")
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for tensor in model.graph.initializer:
        by_shape.setdefault(tuple(tensor.dims), []).append(tensor)
    shape = max((dims for dims, found in by_shape.items() if len(found) > 1), key=lambda dims: int(np.prod(dims)))
    first, second = by_shape[shape][:2]
    first.raw_data, second.raw_data = second.raw_data, first.raw_data
    onnx.save(model, directory / "encoder.onnx")


TAMPERED_ONNX: list[tuple[Callable[[Path], None], str]] = [
    (exchange_onnx_weights, "float32.*gives other features|other features"),
    (lambda directory: truncate(directory / "encoder_float16.onnx"), "cannot load the onnx export"),
    (give_another_mean, "normalises otherwise"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tamper", "cause"), TAMPERED_ONNX)
def test_a_tampered_onnx_export_is_refused_with_its_cause(
    onnx_export: Exported, tamper: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(onnx_export.directory, copy)
    (copy / "manifest.json").unlink()  # its checksums would tell at once
    tamper(copy)
    with pytest.raises(ExportError, match=cause):
        verify_export(copy)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "program"), [("pt2", "encoder.pt2"), ("executorch", "encoder.pte")])
def test_a_tampered_program_is_refused_with_its_cause(
    format: str, program: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    exported: Exported = request.getfixturevalue(f"{format}_export")
    copy = tmp_path / "copy"
    shutil.copytree(exported.directory, copy)
    (copy / "manifest.json").unlink()  # its checksums would tell at once
    write_golden(copy, compute_golden(exchange_blocks(make_student()), format))
    with pytest.raises(ExportError, match="other features than the encoder"):
        verify_export(copy)
    truncate(copy / program)
    with pytest.raises(ExportError, match=f"the {format} export"):
        verify_export(copy)
