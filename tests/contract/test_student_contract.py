"""Every student offers what `distill.encoder` asks of an encoder, and YAML can build it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from distill.encoder import Encoder, TimmLayoutEncoder

RECIPES = {
    "internvit": """
class_path: students.InternViT
init_args: {weights: random, img_size: 56, embed_dim: 32, depth: 3, num_heads: 2, layer_scale: rescaled, seed: 3}
""",
    "internvit_mimetic": """
class_path: students.InternViT
init_args: {weights: random, img_size: 64, patch_size: 32, embed_dim: 48, depth: 3, num_heads: 3, init: mimetic}
""",
    "clip": """
class_path: students.CLIPViT
init_args: {weights: random, img_size: 56, embed_dim: 32, depth: 3, num_heads: 2, attention: explicit}
""",
    "timm_vit": """
class_path: students.TimmStudent
init_args: {model_name: test_vit, weights: random, img_size: 64, model_args: {depth: 3}, drop_path_rate: 0.1}
""",
    "timm_conv": """
class_path: students.TimmStudent
init_args: {model_name: test_convnext, weights: random, img_size: 64, grad_checkpointing: true}
""",
}


def build(recipe: str, protocol: type) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=protocol)
    return parser.instantiate(parser.parse_object({"encoder": yaml.safe_load(recipe)}))["encoder"]


@pytest.fixture(params=RECIPES)
def encoder(request: pytest.FixtureRequest) -> Any:
    encoder = build(RECIPES[request.param], Encoder)
    encoder.load_weights()
    return encoder.eval()


@pytest.mark.parametrize("protocol", [Encoder, TimmLayoutEncoder])
@pytest.mark.parametrize("name", RECIPES)
def test_yaml_builds_a_module_that_offers_the_protocol(name: str, protocol: type) -> None:
    encoder = build(RECIPES[name], protocol)
    assert isinstance(encoder, nn.Module)
    for member in [m for m in dir(protocol) if not m.startswith("_")]:
        assert hasattr(encoder, member), member
    assert all(parameter.is_meta for parameter in encoder.parameters())


def test_the_shapes_are_the_announced_ones(encoder: Any) -> None:
    size = encoder.img_size
    with torch.no_grad():
        layers = encoder.forward_hidden_states(torch.zeros(2, 3, size, size, dtype=torch.uint8), 2)
    assert len(layers) == 2
    for (prefix, patches), width in zip(layers, encoder.layer_dims[-2:], strict=True):
        assert prefix.shape == (2, encoder.num_prefix_tokens, width)
        assert patches.ndim == 4
        assert patches.shape[-1] == width
        assert prefix.dtype == patches.dtype == torch.float32
    side = size // encoder.patch_size
    assert layers[-1][1].shape == (2, side, side, encoder.embed_dim)
    assert encoder.layer_dims[-1] == encoder.embed_dim
    assert len(encoder.layer_dims) == encoder.depth


def test_fewer_layers_are_the_last_of_more(encoder: Any) -> None:
    images = torch.rand(1, 3, encoder.img_size, encoder.img_size)
    with torch.no_grad():
        two, one = encoder.forward_hidden_states(images, 2), encoder.forward_hidden_states(images, 1)
    assert torch.equal(two[-1][1], one[0][1])
    assert torch.equal(two[-1][0], one[0][0])


def test_the_forward_is_deterministic_in_eval_and_changes_no_state(encoder: Any) -> None:
    images = torch.rand(2, 3, encoder.img_size, encoder.img_size)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with torch.no_grad():
        first, second = (encoder.forward_hidden_states(images, 1)[0][1] for _ in range(2))
    assert torch.equal(first, second)
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_each_image_is_encoded_on_its_own(encoder: Any) -> None:
    images = torch.rand(3, 3, encoder.img_size, encoder.img_size)
    with torch.no_grad():
        together = encoder.forward_hidden_states(images, 1)[0][1]
        alone = encoder.forward_hidden_states(images[1:2], 1)[0][1]
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_encoder_normalises_for_itself(encoder: Any) -> None:
    seen: list[torch.Tensor] = []
    first = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mean = torch.tensor(encoder.image_mean).reshape(1, 3, 1, 1).expand(1, 3, encoder.img_size, encoder.img_size)
    with torch.no_grad():
        encoder.forward_hidden_states(mean, 1)
    assert seen[0].abs().max() < 1e-5


def test_every_trained_parameter_gets_a_gradient_and_takes_a_step(encoder: Any) -> None:
    images = torch.rand(2, 3, encoder.img_size, encoder.img_size)
    encoder.train()
    encoder.forward_hidden_states(images, 1)[0][1].square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_every_message_of_a_wrong_image_size_names_size_and_rule(encoder: Any) -> None:
    size = encoder.img_size + 1
    with pytest.raises(ValueError, match=f"image size {size} x {size} is not a multiple of patch_size"):
        encoder.forward_hidden_states(torch.zeros(1, 3, size, size), 1)


def test_the_state_dict_is_timms(encoder: Any) -> None:
    model = timm.create_model(encoder.timm_architecture, **encoder.timm_model_args)
    assert encoder.timm_state_dict().keys() == model.state_dict().keys()
    assert {f"model.{key}" for key in model.state_dict()} == encoder.state_dict().keys()
