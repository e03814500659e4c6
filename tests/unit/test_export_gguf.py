"""The mmproj files: class-token row, names, precisions, refusals; and, where libmtmd is built, its own features.

`bash scripts/build_llama.sh` builds libmtmd; tests that need it are skipped without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from distill.errors import ExportError
from distill.export import libmtmd, mmproj
from distill.export.compare import compare_features
from distill.export.fresh_process import CONSUMERS_ROOT
from distill.export.gguf_file import GGUF, VARIANTS, GgufTarget
from distill.export.golden import Golden, compute_golden, draw_image
from distill.export.weights import read_timm_weights, timm_skeleton
from students import CLIPViT, InternViT

gguf = pytest.importorskip("gguf", reason="install encoder-distill[gguf]")

LLM_WIDTH = 64
SIZES: dict[str, Any] = {"img_size": 56, "embed_dim": 32, "depth": 4, "num_heads": 2}


def make_student(**sizes: int) -> InternViT:
    """An InternViT whose positions matter: at 0.8 an exchanged row costs a cosine of 0.1 and more."""
    torch.manual_seed(0)
    student = InternViT(weights="random", **{**SIZES, **sizes})
    student.load_weights()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.normal_(0.0, 0.8 if "pos_embed" in name else 0.2)
    return student.eval()


def write_projector(path: Path, embed_dim: int = 32, **changes: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(1)
    wide = 4 * embed_dim
    weights = {
        "mlp1.0.weight": 1 + 0.1 * torch.randn(wide, generator=generator),
        "mlp1.0.bias": 0.1 * torch.randn(wide, generator=generator),
        "mlp1.1.weight": torch.randn(LLM_WIDTH, wide, generator=generator) / wide**0.5,
        "mlp1.1.bias": 0.1 * torch.randn(LLM_WIDTH, generator=generator),
        "mlp1.3.weight": torch.randn(LLM_WIDTH, LLM_WIDTH, generator=generator) / LLM_WIDTH**0.5,
        "mlp1.3.bias": 0.1 * torch.randn(LLM_WIDTH, generator=generator),
    }
    save_file({**weights, **changes}, path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> GgufTarget:
    return GGUF.with_companion(write_projector(tmp_path / "projector.safetensors"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "export"
    path.mkdir()
    return path


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_class_tokens_position_is_the_last_row_and_the_patches_keep_their_order(
    target: GgufTarget, directory: Path
) -> None:
    student = make_student()
    target.write(student, directory)
    rows = tensors_of(directory / "mmproj-f16.gguf")["v.position_embd.weight"].data
    positions = student.timm_state_dict()["pos_embed"][0].numpy()
    np.testing.assert_array_equal(rows[-1], positions[0])
    np.testing.assert_array_equal(rows[:-1], positions[1:])


def test_keys_and_precisions_are_those_that_llama_cpp_reads(target: GgufTarget, directory: Path) -> None:
    student = make_student()
    target.write(student, directory)
    fields = mmproj.read_fields(directory / "mmproj-q8_0.gguf")
    assert (fields["general.architecture"], fields["general.type"]) == ("clip", "mmproj")
    assert fields["clip.projector_type"] == "internvl"
    assert fields["clip.use_gelu"] is True  # neither gelu nor silu would mean quick_gelu
    assert fields["clip.vision.projection_dim"] == LLM_WIDTH
    assert fields["clip.vision.image_mean"] == pytest.approx(list(student.image_mean))
    assert fields["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(directory / "mmproj-q8_0.gguf").items()}
    assert {kind for name, kind in kinds.items() if "attn_q.weight" in name or "ffn_up.weight" in name} == {"Q8_0"}
    assert kinds["mm.model.mlp.1.weight"] == "F16"
    assert {kinds[name] for name in ("v.position_embd.weight", "v.patch_embd.weight", "v.blk.0.ln1.bias")} == {"F32"}
    assert tensors_of(directory / "mmproj-f16.gguf")["v.blk.0.ffn_down.weight"].tensor_type.name == "F16"


def test_the_projection_is_the_one_of_transformers_internvl(tmp_path: Path) -> None:
    text = Qwen2Config(
        vocab_size=8, hidden_size=LLM_WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text)).eval().model
    projector = mmproj.read_projector(write_projector(tmp_path / "projector.safetensors"), 32)
    names = {"mlp1.0": "layer_norm", "mlp1.1": "linear_1", "mlp1.3": "linear_2"}
    renamed = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in projector.items()}
    model.multi_modal_projector.load_state_dict(renamed, strict=True)
    patches = torch.randn(1, 4, 6, 32)
    with torch.inference_mode():
        # Its pixel shuffle takes columns before rows, and so does what calls it.
        expected = model.multi_modal_projector(model.pixel_shuffle(patches, scale_factor=0.5))
    torch.testing.assert_close(mmproj.project(patches, projector), expected, rtol=0, atol=1e-5)


def test_without_a_projector_the_target_says_which_flag_gives_one() -> None:
    with pytest.raises(ExportError, match=r"only together with the projector.*--projector FILE.*mlp1\.3\.bias"):
        GGUF.check(make_student())


def test_a_projector_of_another_width_or_without_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    wide = write_projector(tmp_path / "wide.safetensors", embed_dim=48)
    with pytest.raises(ExportError, match=r"mlp1\.0\.weight has shape \(192,\), an encoder of width 32 needs \(128,\)"):
        GGUF.with_companion(wide).check(make_student())
    save_file({"mlp1.0.weight": torch.ones(128)}, tmp_path / "partial.safetensors")
    with pytest.raises(ExportError, match=r"lacks mlp1\.0\.bias, mlp1\.1\.weight"):
        GGUF.with_companion(tmp_path / "partial.safetensors").check(make_student())


def test_students_that_llama_cpp_would_compute_wrongly_are_refused(target: GgufTarget) -> None:
    clip = CLIPViT(weights="random", **SIZES)
    with pytest.raises(ExportError, match=r"'clip' layout cannot be exported as gguf.*shifts CLIP's patches"):
        target.check(clip)
    with pytest.raises(ExportError, match=r"odd grid of patches.*--img_size 84"):
        target.check(InternViT(weights="random", **{**SIZES, "img_size": 70}))
    with pytest.raises(ExportError, match=r"RMSNorm.*--layers"):
        target.check(InternViT(weights="random", img_size=28, embed_dim=3200, depth=45, num_heads=25))


# --- libmtmd ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """libmtmd, imported from the folder that scripts/build_llama.sh fills."""
    if not (CONSUMERS_ROOT / "llama-cpp" / "llama_cpp").is_dir():
        pytest.skip("libmtmd is not built: bash scripts/build_llama.sh")
    monkeypatch.syspath_prepend(str(CONSUMERS_ROOT / "llama-cpp"))


def consume(target: GgufTarget, student: InternViT, directory: Path) -> tuple[Golden, dict[str, torch.Tensor]]:
    golden = compute_golden(student, "gguf", 1, lambda pixels: target.golden_features(student, directory, pixels))
    answers: dict[str, torch.Tensor] = {}
    for variant in target.variants(directory):
        pixels = golden.preprocessing.normalise(golden.image)
        ((prefix, patches),) = target.consumer_features(directory, variant.name, pixels, 1).layers
        answers |= {f"{variant.name}.0.prefix": prefix, f"{variant.name}.0.patches": patches}
    return golden, answers


@pytest.mark.slow
def test_libmtmd_gives_the_projected_features_in_both_precisions(
    llama: None, target: GgufTarget, directory: Path
) -> None:
    student = make_student()
    target.write(student, directory)
    golden, answers = consume(target, student, directory)
    for variant in VARIANTS:
        closeness = compare_features(golden, answers, variant.name, variant.bound, "libmtmd")
        assert closeness.min_cosine >= 0.9999
    # Unequal, so the two files truly differ in precision.
    assert not torch.equal(answers["f16.0.patches"], answers["q8_0.0.patches"])


@pytest.mark.slow
def test_the_class_tokens_position_in_the_first_row_is_found_out_by_libmtmd(
    llama: None, target: GgufTarget, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student()
    names = mmproj.llama_names

    def first_row(*arguments: Any) -> dict[str, torch.Tensor]:
        named = names(*arguments)
        return {**named, "v.position_embd.weight": named["v.position_embd.weight"].roll(1, dims=0)}

    monkeypatch.setattr("distill.export.gguf_file.llama_names", first_row)
    target.write(student, directory)
    golden, answers = consume(target, student, directory)
    with pytest.raises(ExportError, match=r"have a cosine of 0\.\d+ .*at least 0\.9999 is asked for"):
        compare_features(golden, answers, "f16", VARIANTS[0].bound, "libmtmd")


@pytest.mark.slow
def test_libmtmd_normalises_by_the_mean_that_the_file_says(llama: None, target: GgufTarget, directory: Path) -> None:
    student = make_student()
    target.write(student, directory)
    path = directory / "mmproj-f16.gguf"
    session = libmtmd.MtmdSession(path, LLM_WIDTH)
    features = session.encode(draw_image(56, 56))
    reader = gguf.GGUFReader(path, "r+")
    for position in reader.fields["clip.vision.image_mean"].data:
        reader.fields["clip.vision.image_mean"].parts[position][0] = 0.9
    del reader
    changed = libmtmd.MtmdSession(path, LLM_WIDTH).encode(draw_image(56, 56))
    assert float(np.abs(features - changed).max()) > 0.01


@pytest.mark.slow
def test_an_mmproj_file_that_libmtmd_cannot_load_is_refused_with_the_tested_release(
    llama: None, target: GgufTarget, directory: Path
) -> None:
    target.write(make_student(), directory)
    path = directory / "mmproj-f16.gguf"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match=rf"cannot load mmproj-f16\.gguf.*Tested is {libmtmd.TESTED_VERSION}"):
        libmtmd.MtmdSession(path, LLM_WIDTH)


def test_the_weights_are_complete_and_none_is_left_over() -> None:
    student = make_student(depth=2)
    weights = read_timm_weights(student, timm_skeleton(student))
    named = mmproj.llama_names(weights, {})
    assert not weights
    assert len(named) == 4 + 2 * 18
    with pytest.raises(ExportError, match=r"llama\.cpp's InternViT has no place for 1 weights"):
        again = read_timm_weights(student, timm_skeleton(student))
        mmproj.llama_names({**again, "norm.weight": torch.ones(32)}, {})


def test_an_mlp_that_q8_0_cannot_pack_is_refused_before_anything_is_written(target: GgufTarget) -> None:
    student = InternViT(weights="random", **SIZES, mlp_ratio=1.5)
    with pytest.raises(ExportError, match="the MLP's width 48 is no multiple of it"):
        target.check(student)


def test_the_file_names_the_release_that_was_tested(target: GgufTarget, directory: Path) -> None:
    target.write(make_student(), directory)
    for variant in VARIANTS:
        assert mmproj.read_fields(directory / variant.file)[mmproj.TESTED_KEY] == libmtmd.TESTED_VERSION
