"""transformers directories: the hidden states are transformers' own, and nothing is filled in at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distill.probe.transformers_encoder import PREFIX_TOKENS, TransformersEncoder

SIZE, PATCH = 32, 8
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIZE,
}
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "clip_vision_model": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"mlp_ratio": 2}),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "internvl_vision": (
        transformers.InternVLVisionModel,
        transformers.InternVLVisionConfig,
        {"attention_bias": True, "use_mean_pooling": True, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]},
    ),
    "siglip_vision_model": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, {}),
    "vit": (transformers.ViTModel, transformers.ViTConfig, {}),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig, {}),
    "ijepa": (transformers.IJepaModel, transformers.IJepaConfig, {}),
}
PREFIXES = {"dinov2_with_registers": 4, "siglip_vision_model": 0, "deit": 2, "ijepa": 0}


def saved(model_type: str, directory: Path) -> Any:
    model_class, config_class, extra = MODELS[model_type]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **extra})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    text = json.dumps({"image_mean": MEAN, "image_std": STD})
    (directory / "preprocessor_config.json").write_text(text)
    return model


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_hidden_states_are_those_of_transformers_itself(model_type: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path)
    encoder = TransformersEncoder(str(tmp_path))
    encoder.load_weights()
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-2:]
        layers = encoder.forward_hidden_states(images, 2)
    assert len(layers) == 2
    prefixes = PREFIXES.get(model_type, 1)
    assert encoder.num_prefix_tokens == prefixes
    for (prefix, patches), state in zip(layers, expected, strict=True):
        assert prefix.shape == (2, prefixes, 16)
        assert patches.shape == (2, SIZE // PATCH, SIZE // PATCH, 16)
        torch.testing.assert_close(torch.cat([prefix, patches.flatten(1, 2)], dim=1), state)
    assert (encoder.embed_dim, encoder.depth, encoder.patch_size) == (16, 3, PATCH)
    assert encoder.image_mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", "internvl_vision"])
def test_other_image_sizes_are_taken_where_positions_can_be_resized(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    encoder = TransformersEncoder(str(tmp_path))
    encoder.load_weights()
    with torch.no_grad():
        patches = encoder.forward_hidden_states(torch.rand(1, 3, 48, 48), 1)[0][1]
    assert patches.shape == (1, 6, 6, 16)


def test_the_vision_tower_of_a_whole_clip_model_is_found(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**SHAPE).to_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    encoder = TransformersEncoder(str(tmp_path))
    encoder.load_weights()
    images = torch.rand(1, 3, SIZE, SIZE)
    pixels = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        patches = encoder.forward_hidden_states(images, 1)[0][1]
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, 1:])


def test_a_missing_tensor_is_refused_and_not_filled_in_at_random(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if "layer.1.norm1.weight" not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors missing \(first: .*layer\.1\.norm1\.weight"):
        TransformersEncoder(str(tmp_path)).load_weights()


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ValueError, match="cannot be loaded|of another shape"):
        TransformersEncoder(str(tmp_path)).load_weights()


def test_missing_or_truncated_weights_are_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        TransformersEncoder(str(tmp_path)).load_weights()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        TransformersEncoder(str(tmp_path)).load_weights()


def test_a_directory_without_mean_and_std_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="image_mean None must be three numbers"):
        TransformersEncoder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        TransformersEncoder(str(tmp_path))


def test_an_unknown_model_type_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="'resnet' is not one of " + ", ".join(sorted(PREFIX_TOKENS))):
        TransformersEncoder(str(tmp_path))


def test_use_before_loading_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    encoder = TransformersEncoder(str(tmp_path))
    with pytest.raises(RuntimeError, match="load_weights"):
        encoder.forward_hidden_states(torch.rand(1, 3, SIZE, SIZE), 1)
    encoder.load_weights()
    with pytest.raises(ValueError, match="33x32 is not a multiple of patch_size 8"):
        encoder.forward_hidden_states(torch.rand(1, 3, 33, 32), 1)
    with pytest.raises(ValueError, match="from 1 to the depth, 3"):
        encoder.forward_hidden_states(torch.rand(1, 3, SIZE, SIZE), 4)
