"""Every command and every snippet of docs/exports.md runs as printed, beside the files it speaks of."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from distill.checkpoint import load_student
from distill.cli import main
from distill.errors import ConfigError
from distill.export.contract import TOLERANCE
from distill.export.fresh_process import require_consumer
from distill.export.golden import draw_image
from distill.export.targets import TARGETS
from students import CLIPViT, InternViT

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exports.md"
SIZES = {"img_size": 56, "embed_dim": 64, "depth": 4, "num_heads": 4}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]
# What the snippets that compute features read, to compare with the right student.
CLIP_DIRECTORIES = ("encoder-clip", "encoder-open-clip")


def write_run(path: Path, student_class: type[nn.Module]) -> None:
    """Write a run directory as `distill fit` leaves it."""
    (path / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    student: Any = student_class(weights="random", **SIZES)
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.1)
    spec = {"class_path": f"students.{student_class.__name__}", "init_args": {"weights": "random", **SIZES}}
    config = {"seed_everything": 0, "model": {"teachers": {}, "students": {"mine": spec}}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    state = {f"students.mine.{key}": value for key, value in student.state_dict().items()}
    torch.save({"state_dict": state}, path / "checkpoints" / "last.ckpt")


def write_original_clip(path: Path) -> None:
    vision = {"image_size": 56, "layers": 4, "width": 64, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    model_config: dict[str, Any] = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    model = open_clip.CLIP(**{**model_config, "vision_cfg": dict(vision), "text_cfg": dict(text)})
    save_file(model.state_dict(), path / "open_clip_model.safetensors")


def write_vlm(path: Path) -> None:
    vision = InternVLVisionConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=[56, 56],
        attention_bias=True,
    )
    text = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4)
    InternVLForConditionalGeneration(config).save_pretrained(path)
    processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))


def write_projector(path: Path) -> None:
    shapes = {"mlp1.0": (256,), "mlp1.1": (64, 256), "mlp1.3": (64, 64)}
    tensors = {f"{name}.weight": torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0]) * 0.05 for name, shape in shapes.items()}
    save_file(tensors, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a reader of the page stands in, after the page's commands but llama.cpp's."""
    path = tmp_path_factory.mktemp("page")
    before = Path.cwd()
    write_run(path / "runs" / "mine", InternViT)
    write_run(path / "runs" / "clip", CLIPViT)
    write_original_clip(path / "clip-original")
    write_vlm(path / "vlm")
    write_projector(path / "projector.safetensors")
    Image.fromarray(draw_image(56, 56)).save(path / "photo.png")
    os.chdir(path)
    try:
        for command in COMMANDS:
            if "gguf" not in command:
                run_command(command)
        yield path
    finally:
        os.chdir(before)


def run_command(command: str) -> None:
    program, *words = shlex.split(command)
    assert program == "distill"
    main(words)


def test_the_page_has_commands_and_snippets_for_its_formats() -> None:
    text = "\n".join([*COMMANDS, *SNIPPETS])
    for name in ("internvl", "internvl-hf", "dinov2-hf", "clip-hf", "timm", "open_clip", "gguf"):
        assert re.search(rf"[ /]{re.escape(name)}\b", text), name
    table = set(re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(), re.MULTILINE))))
    assert table == set(TARGETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[block.strip().splitlines()[-1][:40] for block in SNIPPETS])
def test_the_snippet_runs_and_gives_the_students_features(folder: Path, snippet: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/exports.md", "exec"), names)
    features = names.get("features")
    if not isinstance(features, torch.Tensor):
        return
    run = "runs/clip" if any(name in snippet for name in CLIP_DIRECTORIES) else "runs/mine"
    student: Any = load_student(folder / run)[1]
    images = torch.from_numpy(draw_image(56, 56)).permute(2, 0, 1).unsqueeze(0)
    with torch.inference_mode():
        _, patches = student.forward_hidden_states(images, num_layers=1)[0]
    assert torch.allclose(features, patches.flatten(1, 2), rtol=0, atol=TOLERANCE)


def test_the_options_change_what_they_say(folder: Path) -> None:
    for name, key, value in (
        ("encoder-first-3", "layers_kept", 3),
        ("encoder-28px", "position_embedding_from_img_size", 56),
        ("encoder-folded", "layer_scale_folded", True),
    ):
        assert json.loads((folder / name / "manifest.json").read_text())["features"][key] == value


def test_the_command_for_llama_cpp_runs_where_its_library_is(folder: Path) -> None:
    (command,) = (command for command in COMMANDS if "gguf" in command)
    if "gguf" in TARGETS:
        try:
            require_consumer(TARGETS["gguf"])
        except ConfigError as error:
            pytest.skip(str(error))
    run_command(command)
    assert (folder / "encoder-gguf" / "manifest.json").is_file()
