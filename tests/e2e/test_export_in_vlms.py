"""An encoder exported from a run of the demo recipe, inside VLMs: it generates, with the features it has outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    Dinov2Model,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.checkpoint import load_student
from distill.export.contract import TOLERANCE
from distill.export.golden import draw_image
from distill.export.run import export, export_encoder
from distill.vlm.tiling import Tiling, cut_tiles, tile_pixels
from students import CLIPViT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_consumers")]

IMAGE_TOKEN = 63
SIZE_PX, GRID = 64, 2  # the demo student's, at the size of tests/e2e/conftest.py
NEW_TOKENS = 4
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def demo(demo_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """The student of a short demo run, and its exports by format."""
    run = tmp_path_factory.mktemp("vlms") / "run"
    done = demo_recipe.run(run, "--trainer.max_epochs=1", "--trainer.max_steps=3", timeout_s=600)
    assert done.returncode == 0, done.stderr
    paths = export(run, format=["internvl", "internvl-hf", "dinov2-hf"])
    return load_student(run)[1], {path.name: path for path in paths}


def pictures(count: int) -> Tensor:
    """Return different pictures, uint8 `[T, 3, S, S]`."""
    drawn = [torch.from_numpy(draw_image(SIZE_PX, SIZE_PX)).roll(11 * number, dims=1) for number in range(count)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous()


def processed(directory: Path, images: Tensor) -> Tensor:
    """Return the pictures as the export's own image processor prepares them."""
    processor = AutoImageProcessor.from_pretrained(directory)
    photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return processor(photos, return_tensors="pt")["pixel_values"]


def prompt(num_image_tokens: int) -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * num_image_tokens, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def last_state(output: Any) -> Tensor:
    """Return the last hidden state that a tower gave: before the norm that some put behind it."""
    states = getattr(output, "hidden_states", None)
    return output.last_hidden_state if states is None else states[-1]


def assert_features_are_the_students(inside: Tensor, tower: nn.Module, student: Any, pixels: Tensor, images: Tensor):
    with torch.inference_mode():
        outside = last_state(tower(pixels, output_hidden_states=True))
        prefix, patches = student.forward_hidden_states(images, num_layers=1)[0]
    assert torch.equal(inside, outside)
    expected = torch.cat([prefix, patches.flatten(1, 2)], dim=1)
    assert torch.allclose(inside, expected, rtol=0, atol=TOLERANCE)


def check_inside(
    model: Any, tower: nn.Module, student: Any, inputs: dict[str, Any], pixels: Tensor, images: Tensor
) -> None:
    """Generate; compare the tower's features inside with those outside and with the student's; then spoil the tower."""
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    inside: list[Tensor] = []
    model.model.vision_tower.register_forward_hook(lambda _, __, output: inside.append(last_state(output)))
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(**inputs).logits
    assert ids.shape[-1] == inputs["input_ids"].shape[-1] + NEW_TOKENS
    assert_features_are_the_students(inside[0], tower, student, pixels, images)
    # The tower is truly in the path: another one gives other logits.
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.neg_()
        assert not torch.allclose(model(**inputs).logits, logits)


def test_the_demo_encoder_generates_inside_internvl(demo: tuple[Any, dict[str, Path]]) -> None:
    student, directory = demo[0], demo[1]["internvl-hf"]
    tower = InternVLVisionModel.from_pretrained(directory)
    tokens = GRID * GRID // 4
    config = InternVLConfig(
        vision_config=tower.config.to_dict(),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=tokens,
    )
    images = pictures(3)
    pixels = processed(directory, images)
    inputs = {**prompt(3 * tokens), "pixel_values": pixels}
    check_inside(InternVLForConditionalGeneration(config).eval(), tower, student, inputs, pixels, images)


def test_the_demo_encoder_generates_inside_llava(demo: tuple[Any, dict[str, Path]]) -> None:
    student, directory = demo[0], demo[1]["dinov2-hf"]
    tower = Dinov2Model.from_pretrained(directory)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
    )
    images = pictures(1)
    pixels = processed(directory, images)
    inputs = {**prompt(GRID * GRID), "pixel_values": pixels}
    check_inside(LlavaForConditionalGeneration(config).eval(), tower, student, inputs, pixels, images)


def test_the_demo_encoder_generates_inside_llava_next_from_several_tiles(demo: tuple[Any, dict[str, Path]]) -> None:
    student, directory = demo[0], demo[1]["dinov2-hf"]
    tower = Dinov2Model.from_pretrained(directory)
    config = LlavaNextConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[SIZE_PX, 2 * SIZE_PX]],
        vision_feature_layer=-1,
    )
    images = pictures(3)  # the whole, and two tiles side by side
    pixels = processed(directory, images)
    # The whole, then two rows of two tiles' columns with a line end each.
    inputs = {
        **prompt(GRID * GRID + GRID * (2 * GRID + 1)),
        "pixel_values": pixels.unsqueeze(0),
        "image_sizes": torch.tensor([[SIZE_PX, 2 * SIZE_PX]]),
    }
    check_inside(LlavaNextForConditionalGeneration(config).eval(), tower, student, inputs, pixels, images)


def make_clip(directory: Path) -> tuple[Any, Path]:
    """Return a CLIP-layout student and its export, at the demo's size."""
    torch.manual_seed(0)
    student: Any = CLIPViT(weights="random", img_size=SIZE_PX, patch_size=32, embed_dim=32, depth=3, num_heads=2)
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.2)
    return student.eval(), export_encoder(student, "clip-hf", directory / "clip").directory


def test_a_clip_layout_encoder_generates_inside_llava(tmp_path: Path) -> None:
    student, directory = make_clip(tmp_path)
    tower = CLIPVisionModel.from_pretrained(directory)
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
    )
    images = pictures(1)
    pixels = processed(directory, images)
    inputs = {**prompt(GRID * GRID), "pixel_values": pixels}
    check_inside(LlavaForConditionalGeneration(config).eval(), tower, student, inputs, pixels, images)


class TinyInternVLChat(nn.Module):
    """The path of an image through OpenGVLab's chat model: tower, pixel shuffle, `mlp1`, language model."""

    def __init__(self, vision_model: nn.Module, width: int) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 16), nn.GELU(), nn.Linear(16, 16))

    def embed_tiles(self, pixel_values: Tensor) -> Tensor:
        """Return `[T * N / 4, 16]` image tokens of T tiles; the class token is dropped, 2 x 2 patches become one."""
        patches = self.vision_model(pixel_values=pixel_values, return_dict=True).last_hidden_state[:, 1:]
        tiles, count, width = patches.shape
        side = round(count**0.5)
        blocks = patches.reshape(tiles, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(blocks.reshape(-1, 4 * width))

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the prompt's embeddings `[1, N, 16]` with the image tokens in place."""
        embeddings = self.language_model.get_input_embeddings()(input_ids).clone()
        embeddings[input_ids == IMAGE_TOKEN] = self.embed_tiles(pixel_values)
        return embeddings


def test_the_demo_encoder_generates_inside_the_original_internvl_layout_from_tiles(
    demo: tuple[Any, dict[str, Path]],
) -> None:
    student, directory = demo[0], demo[1]["internvl"]
    tower: Any = AutoModel.from_pretrained(directory, trust_remote_code=True)
    model = TinyInternVLChat(AutoModel.from_pretrained(directory, trust_remote_code=True), student.embed_dim).eval()
    inside: list[Tensor] = []
    model.vision_model.register_forward_hook(lambda _, __, output: inside.append(output.last_hidden_state))
    photo, tiling = Image.fromarray(draw_image(90, 131)), Tiling(tile_size=SIZE_PX)
    pixels = tile_pixels(photo, tiling, student.image_mean, student.image_std)
    images = torch.stack([as_uint8(tile) for tile in cut_tiles(photo, tiling)])
    inputs = prompt(len(pixels) * GRID * GRID // 4)
    with torch.inference_mode():
        embeddings = model.embed(inputs["input_ids"], pixels)
        ids = model.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        assert len(pixels) > 2  # tiles and a thumbnail
        assert ids.shape == (1, NEW_TOKENS)
        for parameter in model.vision_model.parameters():
            parameter.neg_()
        assert not torch.allclose(model.embed(inputs["input_ids"], pixels), embeddings)
    assert_features_are_the_students(inside[0], tower, student, pixels, images)


def as_uint8(tile: Image.Image) -> Tensor:
    """Return a tile as the student takes it, uint8 `[3, S, S]`."""
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1)
