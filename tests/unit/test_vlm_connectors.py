"""Connectors: how many tokens a tile becomes, which grids are refused, and what a recipe may say."""

from __future__ import annotations

import math

import pytest
import torch

from distill.errors import ConfigError
from distill.vlm.connectors import ConnectorConfig, ConnectorName, build_connector

WIDTH, OUT = 16, 24


def tokens_of(name: ConnectorName, side: int, **options: int) -> int:
    """Return how many tokens a square grid becomes, as `num_tokens` says and as the forward pass gives."""
    small = {"hidden_width": 16, "depth": 1} if name in ("c_abstractor", "qformer") else {}
    connector = build_connector(ConnectorConfig(name, **small, **options), WIDTH, OUT, (side, side))
    made = connector(torch.randn(1, 1, WIDTH), torch.randn(1, side, side, WIDTH))
    assert made.shape == (1, connector.num_tokens(side, side), OUT)
    return made.shape[1]


@pytest.mark.parametrize(
    ("name", "side", "options", "tokens"),
    [
        ("pixel_shuffle_mlp", 32, {}, 256),  # InternVL at 448 px
        ("mlp", 24, {}, 576),  # LLaVA at 336 px
        ("mlp", 32, {}, 1024),
        ("ldp", 24, {}, 144),
        ("ldp", 32, {}, 256),
        ("ldp", 27, {}, 196),
        ("ldp", 16, {}, 64),
        ("ldpv2", 24, {}, 144),
        ("ldpv2", 32, {}, 144),
        ("c_abstractor", 24, {}, 144),
        ("c_abstractor", 32, {"tokens": 64}, 64),
        ("c_abstractor", 32, {"tokens": 256}, 256),
        ("average_pooling", 32, {"tokens": 64}, 64),
        ("average_pooling", 32, {}, 144),
        ("attention_pooling", 32, {"tokens": 64}, 64),
        ("attention_pooling", 27, {}, 144),
        ("qformer", 32, {}, 32),
        ("qformer", 27, {}, 32),
    ],
)
def test_a_tile_becomes_the_published_number_of_tokens(
    name: ConnectorName, side: int, options: dict[str, int], tokens: int
) -> None:
    assert tokens_of(name, side, **options) == tokens


@pytest.mark.parametrize(
    ("config", "grid", "words"),
    [
        (ConnectorConfig("pixel_shuffle_mlp"), (27, 27), "odd side"),
        (ConnectorConfig("ldpv2"), (8, 8), "at most 64"),
        (ConnectorConfig("average_pooling"), (12, 11), "at most 121"),
        (ConnectorConfig("c_abstractor", tokens=100), (9, 12), "at most 81"),
        (ConnectorConfig("ldpv2", tokens=20), (24, 24), "use 16 or 25"),
        (ConnectorConfig("average_pooling", tokens=2), (24, 24), "use 1 or 4"),
    ],
)
def test_a_grid_that_a_connector_cannot_take_is_refused_with_a_way_out(
    config: ConnectorConfig, grid: tuple[int, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build_connector(config, WIDTH, OUT, grid)


def test_grids_need_not_be_square() -> None:
    for name, tokens in {"pixel_shuffle_mlp": 12, "mlp": 48, "ldp": 12, "ldpv2": 9, "c_abstractor": 9}.items():
        options = {"tokens": 9} if tokens == 9 else {}
        config = ConnectorConfig(name, **options)  # type: ignore[arg-type]
        connector = build_connector(config, WIDTH, OUT, (4, 12))
        assert connector(torch.randn(2, 0, WIDTH), torch.randn(2, 4, 12, WIDTH)).shape == (2, tokens, OUT)


def test_a_c_abstractor_refuses_images_of_another_size_than_its_positions() -> None:
    connector = build_connector(ConnectorConfig("c_abstractor", tokens=4, hidden_width=8, depth=1), 8, OUT, (4, 4))
    with pytest.raises(ConfigError, match="4 x 4 patches and met 6 x 6"):
        connector(torch.randn(1, 1, 8), torch.randn(1, 6, 6, 8))


def test_attention_pooling_is_scaled_dot_product_attention_of_its_queries() -> None:
    connector = build_connector(ConnectorConfig("attention_pooling", tokens=3), 128, OUT, (2, 2))
    patches = torch.randn(2, 2, 2, 128)
    state = connector.state_dict()
    tokens = torch.nn.functional.layer_norm(patches.flatten(1, 2), (128,))
    weights, biases = state["attention.in_proj_weight"].chunk(3), state["attention.in_proj_bias"].chunk(3)
    inputs = (state["queries"].expand(2, -1, -1), tokens, tokens)
    heads = [(x @ w.T + b).view(2, -1, 2, 64).transpose(1, 2) for x, w, b in zip(inputs, weights, biases, strict=True)]
    scores = (heads[0] @ heads[1].transpose(2, 3) / math.sqrt(64)).softmax(-1)
    pooled = (scores @ heads[2]).transpose(1, 2).flatten(2)
    pooled = pooled @ state["attention.out_proj.weight"].T + state["attention.out_proj.bias"]
    expected = pooled @ state["linear.weight"].T + state["linear.bias"]
    made = connector(torch.zeros(2, 1, 128), patches)
    assert torch.allclose(made, expected, atol=1e-6)
    shuffled = patches.flatten(1, 2)[:, [2, 0, 3, 1]].view(2, 2, 2, 128)
    assert torch.allclose(connector(torch.zeros(2, 1, 128), shuffled), made, atol=1e-6)  # the order is lost


def test_only_the_q_former_reads_the_class_token() -> None:
    prefix, patches = torch.randn(1, 1, WIDTH), torch.randn(1, 4, 4, WIDTH)
    names: list[ConnectorName] = ["pixel_shuffle_mlp", "mlp", "ldp", "ldpv2", "average_pooling", "attention_pooling"]
    for name in [*names, "qformer"]:
        options = {"tokens": 4} if name not in ("pixel_shuffle_mlp", "mlp", "ldp") else {}
        options |= {"hidden_width": 16, "depth": 1} if name == "qformer" else {}
        connector = build_connector(ConnectorConfig(name, **options), WIDTH, OUT, (4, 4))  # type: ignore[arg-type]
        same = torch.equal(connector(prefix, patches), connector(prefix + 1, patches))
        # A LayerNorm takes a shift away; a scaled token it cannot undo together with one.
        same = same and torch.equal(connector(prefix, patches), connector(prefix.flip(-1), patches))
        assert same == (name != "qformer"), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "mlp", "tokens": 64}, "ldpv2, c_abstractor"),
        ({"name": "ldpv2", "bottleneck_width": 4096}, "qformer have it"),
        ({"name": "qformer", "depth": 0}, "positive"),
        ({"name": "linear"}, "pixel_shuffle_mlp"),
    ],
)
def test_an_option_that_a_connector_lacks_is_refused_by_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ConnectorConfig(**options)  # type: ignore[arg-type]


def test_widths_that_cannot_be_cut_into_heads_or_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        build_connector(ConnectorConfig("qformer", hidden_width=100, depth=1), WIDTH, OUT, (4, 4))
    with pytest.raises(ConfigError, match="no multiple of 8"):
        build_connector(ConnectorConfig("ldp"), WIDTH, 20, (4, 4))


def test_every_parameter_of_every_connector_gets_a_gradient() -> None:
    for name in ConnectorName.__args__:  # type: ignore[attr-defined]
        options = {"tokens": 4} if name not in ("pixel_shuffle_mlp", "mlp", "ldp") else {}
        options |= {"hidden_width": 64, "depth": 2} if name in ("qformer", "c_abstractor") else {}
        connector = build_connector(ConnectorConfig(name, **options), WIDTH, OUT, (4, 4))
        made = connector(torch.randn(2, 1, WIDTH), torch.randn(2, 4, 4, WIDTH))
        (made * torch.randn_like(made)).sum().backward()
        without = [key for key, value in connector.named_parameters() if value.grad is None or not value.grad.any()]
        assert without == [], name


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (192, 0.04)])
def test_the_q_former_begins_with_berts_deviation_and_with_its_gain_at_other_widths(width: int, std: float) -> None:
    connector = build_connector(ConnectorConfig("qformer", hidden_width=width, depth=1), WIDTH, OUT, (2, 2))
    weights = connector.state_dict()
    for name in ("layers.0.widen", "layers.0.attention.query", "layers.0.cross_attention.dense"):
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(std, rel=0.05)
