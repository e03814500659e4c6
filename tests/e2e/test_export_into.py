"""`distill export RUN --into DIR --out NEW`, from a run of the demo recipe to a VLM that writes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoint import load_student
from distill.cli import main
from distill.export.golden import compute_golden
from distill.export.run import as_timm_layout
from distill.training_cli import run as train

pytestmark = pytest.mark.usefixtures("forked_consumers")

transformers = pytest.importorskip("transformers", reason="the consumer is an optional extra")

TOLERANCE = 1e-5  # the bound that an export is held to, float32
IMAGE_TOKEN = 63


def write_internvl(directory: Path) -> None:
    """A tiny InternVL for the demo student: width 192, a grid of 2 x 2, so one token an image after the shuffle."""
    vision = transformers.InternVLVisionConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=64,
        image_size=[64, 64],
        patch_size=[32, 32],
        attention_bias=True,
    )
    text = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    transformers.InternVLForConditionalGeneration(config).save_pretrained(directory)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's and its command line's own, in the training that comes first
def test_a_trained_student_takes_the_towers_place_by_one_command(demo_recipe: Any, tmp_path: Path) -> None:
    run, vlm, out = tmp_path / "run", tmp_path / "vlm", tmp_path / "new"
    train(demo_recipe.words(run, "--trainer.max_steps=2"))
    write_internvl(vlm)
    main(["export", str(run), "--into", str(vlm), "--out", str(out)])
    config = json.loads((out / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["vision_config"]["intermediate_size"]) == (6, 384)
    old, new = load_file(vlm / "model.safetensors"), load_file(out / "model.safetensors")
    others = [key for key in old if not key.startswith("vision_tower.")]
    assert others
    assert all(torch.equal(old[key], new[key]) for key in others)
    _, student = load_student(run)
    golden = compute_golden(as_timm_layout(student), "test")
    model = transformers.InternVLForConditionalGeneration.from_pretrained(out).eval()
    pixel_values = golden.preprocessing.normalise(golden.image)
    with torch.inference_mode():
        inside = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    assert torch.allclose(inside, golden.layers[-1][1].flatten(1, 2), rtol=0, atol=TOLERANCE)
    ids = torch.tensor([[1, IMAGE_TOKEN, 5]])
    text = model.generate(input_ids=ids, pixel_values=pixel_values, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert text.shape == (1, 6)
