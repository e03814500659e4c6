"""Students that come from CLIP, against CLIP as open_clip and transformers compute it."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from students import CLIPViT, InternViT
from students.images import CLIP_MEAN, CLIP_STD

WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 3, 4, 14, 56
GEOMETRY = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
# Float32 sums of 64 to 588 terms in another order: a few units in the last place of values around 4.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference() -> VisionTransformer:
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=HEADS, mlp_ratio=4.0, act_layer=QuickGELU
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            # Norms at 1 and 0 and biases at 0 would hide a swapped or forgotten one.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


@pytest.fixture(scope="module")
def weights(reference: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("clip") / "open_clip.safetensors"
    save_file({f"visual.{k}": v.clone() for k, v in reference.state_dict().items()}, file)
    return str(file)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def clip_normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def test_every_hidden_state_of_the_clip_student_equals_open_clip(
    reference: VisionTransformer, weights: str, images: Tensor
) -> None:
    student = CLIPViT(weights, SIDE, **GEOMETRY)
    student.load_weights()
    ours = student.eval().forward_hidden_states(images, DEPTH)
    theirs = reference.forward_intermediates(
        clip_normalised(images), output_fmt="NLC", output_extra_tokens=True, normalize_intermediates=False
    )
    assert len(theirs["image_intermediates"]) == DEPTH
    for (prefix, patches), tokens, extra in zip(
        ours, theirs["image_intermediates"], theirs["image_intermediates_prefix"], strict=True
    ):
        assert patches.shape == (2, SIDE // PATCH, SIDE // PATCH, WIDTH)
        torch.testing.assert_close(patches.flatten(1, 2), tokens, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(prefix, extra, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_every_hidden_state_of_the_clip_student_equals_transformers(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_factor=5.0,
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    student = CLIPViT(str(tmp_path), SIDE, **GEOMETRY)
    student.load_weights()
    theirs = model(pixel_values=clip_normalised(images), output_hidden_states=True).hidden_states
    # The first of transformers' states is the input of the first block.
    assert len(theirs) == DEPTH + 1
    for (prefix, patches), tokens in zip(
        student.eval().forward_hidden_states(images, DEPTH), theirs[-DEPTH:], strict=True
    ):
        torch.testing.assert_close(torch.cat([prefix, patches.flatten(1, 2)], 1), tokens, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_final_norm_of_clip_is_kept_with_its_weights(reference: VisionTransformer, weights: str) -> None:
    student = CLIPViT(weights, SIDE, **GEOMETRY)
    student.load_weights()
    state = student.timm_state_dict()
    assert torch.equal(state["norm.weight"], reference.ln_post.weight)
    assert torch.equal(state["norm.bias"], reference.ln_post.bias)


@torch.no_grad()
def test_clip_blocks_in_an_internvit_equal_clip_blocks_on_the_same_tokens(
    reference: VisionTransformer, weights: str
) -> None:
    student = InternViT(weights, SIDE, **GEOMETRY, act="quick_gelu")
    student.load_weights()
    tokens = torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(3))
    ours, theirs = tokens, tokens
    for block, resblock in zip(student.eval().model.blocks, reference.transformer.resblocks, strict=True):
        ours, theirs = block(ours), resblock(theirs)
        # Looser than above: InternViT's LayerNorm has epsilon 1e-6, CLIP's 1e-5.
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_class_token_of_the_linearised_transfer_enters_the_blocks_exactly(
    reference: VisionTransformer, weights: str
) -> None:
    student = InternViT(weights, SIDE, **GEOMETRY)
    student.load_weights()
    state = student.timm_state_dict()
    expected = reference.ln_pre(reference.class_embedding + reference.positional_embedding[0])
    torch.testing.assert_close((state["cls_token"] + state["pos_embed"][:, :1])[0, 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("student_class", [CLIPViT, InternViT])
@torch.no_grad()
def test_timm_rebuilds_a_student_from_its_name_arguments_and_state_dict(
    student_class: type[CLIPViT] | type[InternViT], weights: str, images: Tensor
) -> None:
    student = student_class(weights, SIDE, **GEOMETRY)
    student.load_weights()
    rebuilt = timm.create_model(student.timm_architecture, **student.timm_model_args)
    rebuilt.load_state_dict(student.timm_state_dict(), strict=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (student.image_mean, student.image_std))
    maps = rebuilt.eval().forward_intermediates(
        (images.float() / 255 - mean) / std, indices=DEPTH, norm=False, intermediates_only=True
    )
    for (_, patches), theirs in zip(student.eval().forward_hidden_states(images, DEPTH), maps, strict=True):
        torch.testing.assert_close(patches, theirs.permute(0, 2, 3, 1), atol=1e-6, rtol=0)


def test_open_clip_knows_the_model_that_pretrained_names() -> None:
    config = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    assert config is not None
    tower = config["vision_cfg"]
    assert (tower["width"], tower["layers"], tower["patch_size"], tower["image_size"]) == (1024, 24, 14, 336)
    cfg = timm.get_pretrained_cfg("vit_large_patch14_clip_quickgelu_336.openai")
    assert cfg is not None
    assert cfg.hf_hub_id
    assert cfg.input_size == (3, 336, 336)
