"""Connectors against independent implementations of the same parts, with the same random weights.

transformers' InternVL projector and BLIP-2 Q-Former, torchvision's MobileNetV3 blocks for LDP, timm's RegStage for the
C-Abstractor. Weights are copied in the order of the parameters, which is the order of computation on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.vlm.connectors import LDP, CAbstractor, LDPv2, PixelShuffleMLP, QFormer

TOLERANCE = 2e-6
"""Of the largest value, in float32 through at most thirty layers."""


def copy_weights(source: Iterable[nn.Module], target: nn.Module) -> None:
    """Copy parameters one after another; every one must meet one of its own shape, and none be left over."""
    given = [parameter for module in source for parameter in module.parameters()]
    taken = list(target.parameters())
    assert [tuple(p.shape) for p in given] == [tuple(p.shape) for p in taken]
    with torch.no_grad():
        for theirs, ours in zip(given, taken, strict=True):
            theirs.normal_(std=0.3 if theirs.ndim > 1 else 1.0)  # norms and biases must count, too
            ours.copy_(theirs)


def patches_of(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * columns)
    return torch.randn(2, 1, width), torch.randn(2, rows, columns, width)


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-2  # equal because all are alike would prove nothing
    return float(((ours - theirs).abs() / theirs.abs().max()).max())


def maps(patches: Tensor) -> Tensor:
    return patches.permute(0, 3, 1, 2)


def tokens(feature_maps: Tensor) -> Tensor:
    return feature_maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
@torch.no_grad()
def test_pixel_shuffle_mlp_equals_the_internvl_projector_of_transformers(grid: tuple[int, int]) -> None:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    config = InternVLConfig(vision_config=InternVLVisionConfig(hidden_size=32), text_config=Qwen2Config(hidden_size=48))
    theirs, ours = InternVLMultiModalProjector(config), PixelShuffleMLP(32, 48)
    copy_weights([theirs], ours)
    prefix, patches = patches_of(*grid, 32)
    shuffled = InternVLModel.pixel_shuffle(None, patches, scale_factor=0.5)  # type: ignore[arg-type]
    expected = theirs(shuffled.flatten(1, 2))
    assert worst(ours(prefix, patches), expected) <= TOLERANCE


@torch.no_grad()
def test_pixel_shuffle_is_neither_version_one_nor_torch_unshuffle() -> None:
    from distill.vlm.connectors.perceptrons import pixel_shuffle

    patches = torch.arange(4 * 4 * 3, dtype=torch.float32).view(1, 4, 4, 3)
    made = pixel_shuffle(patches)
    assert made[0, 0, 1].tolist() == [*patches[0, 0, 2], *patches[0, 0, 3], *patches[0, 1, 2], *patches[0, 1, 3]]
    assert not torch.equal(made, made.transpose(1, 2))  # version 1 is the transpose
    assert not torch.equal(made, F.pixel_unshuffle(maps(patches), 2).permute(0, 2, 3, 1))


@pytest.mark.parametrize("width", [32, 40, 72])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
@torch.no_grad()
def test_ldp_equals_torchvision_mobilenet_blocks(grid: tuple[int, int], width: int) -> None:
    from timm.layers.norm_act import LayerNormAct2d
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
    from torchvision.ops.misc import SqueezeExcitation

    def block(stride: int) -> nn.Module:
        # As MobileVLM builds it; "without an activation" there means that timm's class applies none itself.
        return InvertedResidual(
            InvertedResidualConfig(width, 3, width, width, True, "HS", stride, 1, 1),
            partial(LayerNormAct2d, act_layer=None),
            partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid),
        )

    mlp = nn.Sequential(nn.Linear(24, width), nn.GELU(), nn.Linear(width, width))
    theirs = nn.Sequential(block(1), block(2))
    ours = LDP(24, width)
    copy_weights([mlp, theirs], ours)
    prefix, patches = patches_of(*grid, 24)
    assert worst(ours(prefix, patches), tokens(theirs(maps(mlp(patches))))) <= TOLERANCE


@torch.no_grad()
def test_ldpv2_equals_its_definition_written_with_explicit_windows() -> None:
    ours = LDPv2(16, 24, tokens=9)
    mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24))
    convolution = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    copy_weights([mlp, convolution], ours)
    prefix, patches = patches_of(8, 8, 16)
    hidden = mlp(patches)
    # Windows of adaptive pooling from 8 to 3: floor(8 i / 3) to ceil(8 (i + 1) / 3).
    windows = [slice(0, 3), slice(2, 6), slice(5, 8)]
    pooled = torch.stack([torch.stack([hidden[:, y, x].mean((1, 2)) for x in windows], 1) for y in windows], 1)
    padded = F.pad(maps(pooled), (1, 1, 1, 1))
    kernel = convolution.weight[:, 0]
    convolved = sum(
        padded[:, :, y : y + 3, x : x + 3] * kernel[None, :, y, x, None, None] for y in range(3) for x in range(3)
    )
    expected = maps(pooled) + convolved + convolution.bias[None, :, None, None]
    assert worst(ours(prefix, patches), tokens(expected)) <= TOLERANCE


@pytest.mark.parametrize("hidden_width", [32, 24])
@torch.no_grad()
def test_the_c_abstractor_equals_timm_regnet_stages(hidden_width: int) -> None:
    from timm.layers.norm import LayerNorm2d
    from timm.models.regnet import RegStage

    stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
    before, after = stage(2, 32, hidden_width), stage(2, hidden_width, hidden_width)
    readout = nn.Sequential(nn.Linear(hidden_width, 48), nn.SiLU(), nn.Linear(48, 48))
    positions = nn.ParameterList([torch.zeros(1, 6, 6, 32)])
    ours = CAbstractor(32, 48, (6, 6), tokens=9, hidden_width=hidden_width, depth=2)
    copy_weights([positions, before, after, readout], ours)
    prefix, patches = patches_of(6, 6, 32)
    pooled = F.adaptive_avg_pool2d(before(maps(patches + positions[0])), 3)
    assert worst(ours(prefix, patches), readout(tokens(after(pooled)))) <= TOLERANCE


@pytest.mark.parametrize("bottleneck_width", [None, 80])
@torch.no_grad()
def test_the_q_former_equals_that_of_transformers(bottleneck_width: int | None) -> None:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
        encoder_hidden_size=40,
        cross_attention_frequency=2,
        use_qformer_text_input=False,
    )
    theirs = Blip2QFormerModel(config).eval()
    ln_vision, queries = nn.LayerNorm(40), nn.Parameter(torch.zeros(1, 5, 128))
    widths = [128, 48] if bottleneck_width is None else [128, bottleneck_width, 48]
    projections = nn.Sequential(*map(nn.Linear, widths, widths[1:]))
    ours = QFormer(40, 48, tokens=5, hidden_width=128, depth=4, bottleneck_width=bottleneck_width)
    copy_weights([nn.ParameterList([queries]), ln_vision, theirs, projections], ours)
    prefix, patches = patches_of(5, 7, 40)
    context = ln_vision(torch.cat([prefix, patches.flatten(1, 2)], 1))
    mask = torch.ones(context.shape[:2], dtype=torch.long)
    states = theirs(
        query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=context, encoder_attention_mask=mask
    ).last_hidden_state
    assert worst(ours(prefix, patches), projections(states)) <= TOLERANCE
