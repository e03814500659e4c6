"""What every student shares: images, hidden states, attention, checkpointing, weights on demand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from students import CLIPViT, InternViT, TimmStudent
from students.images import CLIP_MEAN, CLIP_STD, normalise_images
from students.timm_encoder import TimmEncoder

TINY = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}


def internvit(**options: object) -> InternViT:
    student = InternViT("random", **{**TINY, **options})
    student.load_weights()
    return student.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_default_internvit_has_exactly_the_parameters_of_the_release() -> None:
    student = InternViT("nowhere")
    assert sum(p.numel() for p in student.parameters()) == 304_012_288
    assert all(p.is_meta for p in student.parameters())
    assert (student.embed_dim, student.depth, student.patch_size, student.img_size) == (1024, 24, 14, 448)
    assert student.layout == "internvit"


def test_the_default_clip_student_has_the_parameters_of_clip_at_448_px() -> None:
    student = CLIPViT("nowhere")
    # Openai's vision tower at 336 px without its projection has 303,507,456; 448 px adds 448 rows of 1024.
    assert sum(p.numel() for p in student.parameters()) == 303_507_456 + 448 * 1024
    assert student.model.pos_embed.shape == (1, 1025, 1024)
    assert student.layout == "clip"


def test_uint8_and_float_images_give_the_same_hidden_states(images: Tensor) -> None:
    student = internvit()
    with torch.no_grad():
        a, b = (student.forward_hidden_states(x, 1)[0][1] for x in (images, images.float() / 255))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
def test_images_are_normalised_in_float32_by_exact_numbers(images: Tensor, image_dtype: torch.dtype) -> None:
    given = images if image_dtype == torch.uint8 else images.float() / 255
    kept = given.clone()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = (images.float() / 255 - mean) / std
    assert torch.equal(normalise_images(given, CLIP_MEAN, CLIP_STD, torch.float32), expected)
    assert torch.equal(given, kept)


def test_a_student_cast_to_bfloat16_normalises_before_it_rounds(images: Tensor) -> None:
    student = CLIPViT("random", **TINY)
    student.load_weights()
    pixels: list[Tensor] = []
    student.bfloat16().eval().model.patch_embed.register_forward_pre_hook(lambda _, args: pixels.append(args[0]))
    with torch.no_grad():
        student.forward_hidden_states(images, 1)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(pixels[0], ((images.float() / 255 - mean) / std).bfloat16())


def test_the_last_layers_come_oldest_first_and_before_any_norm(images: Tensor) -> None:
    student = CLIPViT("random", **TINY)
    student.load_weights()
    outputs: list[Tensor] = []
    for block in student.eval().model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    layers = student.forward_hidden_states(images, 2)
    assert len(layers) == 2
    for (prefix, patches), out in zip(layers, outputs[1:], strict=True):
        assert torch.equal(torch.cat([prefix, patches.flatten(1, 2)], 1), out)


def test_patches_keep_rows_and_columns_of_an_oblong_image() -> None:
    student = internvit()
    images = torch.zeros(1, 3, 28, 84, dtype=torch.uint8)
    bright = images.clone()
    bright[:, :, 14:28, 70:84] = 255  # patch in row 1, column 5
    with torch.no_grad():
        hooked: list[Tensor] = []
        student.model.patch_embed.register_forward_hook(lambda _, __, out: hooked.append(out))
        prefix, patches = student.forward_hidden_states(bright, 1)[0]
        student.forward_hidden_states(images, 1)
    assert patches.shape == (1, 2, 6, 32)
    assert prefix.shape == (1, 1, 32)
    changed = (hooked[0] - hooked[1]).abs().amax(dim=-1).reshape(2, 6) > 1e-6
    assert changed.nonzero().tolist() == [[1, 5]]


def test_an_image_size_between_patches_is_refused_with_the_sizes_next_to_it() -> None:
    student = internvit()
    with pytest.raises(ValueError, match=r"image size 450 x 450 is not a multiple of patch_size 14; use 448 or 462\."):
        student.forward_hidden_states(torch.zeros(1, 3, 450, 450), 1)
    with pytest.raises(ValueError, match=r"img_size 450 is not a multiple of patch_size 14; use 448 or 462\."):
        InternViT("random", img_size=450)
    with pytest.raises(ValueError, match=r"img_size 450 is not a multiple of patch_size 14"):
        CLIPViT("random", img_size=450)


@pytest.mark.parametrize(
    ("images", "rule"),
    [
        (torch.zeros(1, 1, 56, 56), r"\[B, 3, H, W\]"),
        (torch.zeros(3, 56, 56), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 56, 56, dtype=torch.int64), "uint8"),
    ],
)
def test_images_of_another_shape_or_dtype_are_refused(images: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        internvit().forward_hidden_states(images, 1)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_a_number_of_layers_out_of_range_is_refused(num_layers: int, images: Tensor) -> None:
    with pytest.raises(ValueError, match="1 to 3 hidden states"):
        internvit().forward_hidden_states(images, num_layers)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_dim 32 is not a multiple of num_heads 5"):
        InternViT("random", embed_dim=32, num_heads=5)


def test_explicit_attention_is_chosen_for_bfloat16_on_a_cpu_only(images: Tensor) -> None:
    student = internvit()
    fused = [block.attn for block in student.model.blocks]
    with torch.no_grad():
        full = student.forward_hidden_states(images, 1)[0][1]
        assert all(attention.fused_attn for attention in fused)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = student.forward_hidden_states(images, 1)[0][1]
        assert not any(attention.fused_attn for attention in fused)
        again = student.forward_hidden_states(images, 1)[0][1]
        assert all(attention.fused_attn for attention in fused)
    assert torch.equal(full, again)
    assert torch.cosine_similarity(full.flatten(), half.float().flatten(), dim=0) > 0.999


def test_sdpa_and_explicit_attention_are_kept_when_asked_for_and_agree(images: Tensor) -> None:
    states = []
    for attention in ("sdpa", "explicit"):
        student = internvit(attention=attention)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            student.forward_hidden_states(images, 1)
        assert student.model.blocks[0].attn.fused_attn == (attention == "sdpa")
        with torch.no_grad():
            states.append(student.forward_hidden_states(images, 1)[0][1])
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def saved_bytes(student: nn.Module, images: Tensor) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = student.forward_hidden_states(images, 1)[0][1].square().mean()
    loss.backward()
    return total


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(images: Tensor) -> None:
    plain, checkpointed = (internvit(grad_checkpointing=flag).train() for flag in (False, True))
    assert saved_bytes(checkpointed, images) < saved_bytes(plain, images) / 2
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_weights_are_read_by_load_weights_only_and_once(images: Tensor) -> None:
    student = InternViT("random", **TINY)
    with pytest.raises(RuntimeError, match=r"Call load_weights\(\) first"):
        student.forward_hidden_states(images, 1)
    with pytest.raises(RuntimeError, match=r"Call load_weights\(\) first"):
        student.timm_state_dict()
    student.load_weights()
    with torch.no_grad():
        student.model.cls_token.fill_(7.0)
    student.load_weights()
    assert torch.all(student.model.cls_token == 7.0)


def small_swin() -> TimmStudent:
    # Its relative position index is a buffer that no state dict holds.
    sizes = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 1], "window_size": 7, "patch_size": 2}
    return TimmStudent("swin_tiny_patch4_window7_224", "random", 28, sizes)


@pytest.mark.parametrize(
    "student",
    [lambda: InternViT("random", **TINY), lambda: CLIPViT("random", **TINY), small_swin],
    ids=["internvit", "clip", "swin"],
)
def test_a_student_built_on_the_meta_device_works_from_a_state_dict_alone(student: Callable[[], TimmEncoder]) -> None:
    with torch.device("meta"):
        empty = student()
    source = student()
    source.load_weights()
    empty.load_state_dict(source.state_dict(), strict=True, assign=True)
    images = torch.rand(1, 3, source.img_size, source.img_size)
    with torch.no_grad():
        ours, theirs = (encoder.eval().forward_hidden_states(images, 1)[0][1] for encoder in (empty, source))
    assert torch.equal(ours, theirs)


def test_a_student_can_be_copied_and_cast(images: Tensor) -> None:
    student = internvit()
    twin = copy.deepcopy(student).to(torch.bfloat16)
    with torch.no_grad():
        assert twin.forward_hidden_states(images, 1)[0][1].dtype == torch.bfloat16
        assert student.forward_hidden_states(images, 1)[0][1].dtype == torch.float32


def test_drop_path_acts_in_training_only_and_is_no_part_of_the_rebuilt_model(images: Tensor) -> None:
    student = internvit(drop_path_rate=0.9)
    assert "drop_path_rate" not in student.timm_model_args
    with torch.no_grad():
        a, b = (student.forward_hidden_states(images, 1)[0][1] for _ in range(2))
        assert torch.equal(a, b)
        student.train()
        c = student.forward_hidden_states(images, 1)[0][1]
    assert not torch.equal(a, c)


def test_quick_gelu_changes_the_function_and_travels_with_the_model_arguments(images: Tensor) -> None:
    gelu, quick = internvit(), internvit(act="quick_gelu")
    assert quick.timm_model_args["act_layer"] == "quick_gelu"
    assert "act_layer" not in gelu.timm_model_args
    with torch.no_grad():
        difference = gelu.forward_hidden_states(images, 1)[0][1] - quick.forward_hidden_states(images, 1)[0][1]
    assert 1e-5 < difference.abs().max() < 1.0
