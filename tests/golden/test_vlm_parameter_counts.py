"""Parameter counts at real size, on the meta device, against those that the papers and model cards state.

Where a published figure is not the model's total, the test says what it counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from distill.vlm.connectors import ConnectorConfig, build_connector
from distill.vlm.language import LanguageConfig, build_language_model
from distill.vlm.parameters import count, count_lora

pytestmark = pytest.mark.slow

# config.json of each language model, what its size depends on.
MOBILE_LLAMA: dict[str, dict[str, Any]] = {
    "1.4B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5632},
    "2.7B": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 6912},
}
QWEN2_HALF_B = {
    "vocab_size": 151655,  # Qwen2's and InternVL's special tokens
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
}
INTERNLM2_1_8B = {
    "vocab_size": 92553,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
PHI3_MINI = {
    "vocab_size": 32020,
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
}
PHI2 = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
}


def on_meta(kind: str, sizes: dict[str, Any], **options: Any) -> nn.Module:
    """Return a language model of real size that takes no memory."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        return build_language_model(LanguageConfig(Path("none"), **options), config)


def internvit_300m() -> int:
    with torch.device("meta"):
        return count(timm.create_model("vit_intern300m_patch14_448"))


def connector(name: str, in_width: int, out_width: int, grid: tuple[int, int], **options: int) -> nn.Module:
    with torch.device("meta"):
        return build_connector(ConnectorConfig(name, **options), in_width, out_width, grid)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "percent"), [("1.4B", 8.87), ("2.7B", 7.41)])
def test_lora_of_every_linear_is_the_published_share_of_mobile_llama(size: str, percent: float) -> None:
    # MobileVLM V1 with r = 128. The share is of the language model without LoRA, head and embeddings included, and cut
    # off after two digits: it is 8.877 and 7.413 %.
    model = on_meta("Llama", MOBILE_LLAMA[size], tune="lora", lora_rank=128, lora_alpha=256.0)
    share = 100 * count_lora(model) / (count(model) - count_lora(model))
    assert int(100 * share) / 100 == percent
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count_lora(model)


def test_lora_of_the_attention_alone_is_not_the_published_share() -> None:
    model = on_meta("Llama", MOBILE_LLAMA["1.4B"], tune="lora", lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert 100 * count_lora(model) / (count(model) - count_lora(model)) == pytest.approx(3.69, abs=0.01)


def test_ldp_has_less_than_20_million_parameters_with_mobile_llama_1_4b_alone() -> None:
    # MobileVLM V1: "less than 20M". That is the 1.7B model's; both Linears and both blocks grow with the
    # square of the language model's width, and at 2560 there are 28.9 M.
    assert count(connector("ldp", 1024, 2048, (24, 24))) == 18_936_832
    assert count(connector("ldp", 1024, 2560, (24, 24))) == 28_913_920


def test_ldpv2_has_the_parameters_of_two_linears_and_a_depthwise_convolution() -> None:
    # MobileVLM V2: 99.8 % fewer than LDP. That is so of the part behind the Linears: 20 thousand instead of 12.6 M.
    with torch.device("meta"):
        linears = count(nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 2048)))
    ldp, ldpv2 = (count(connector(name, 1024, 2048, (24, 24))) - linears for name in ("ldp", "ldpv2"))
    assert (ldp, ldpv2) == (12_641_280, 20_480)
    assert 1 - ldpv2 / ldp == pytest.approx(0.998, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "sizes", "published_billions"),
    [("Qwen2", QWEN2_HALF_B, 0.94), ("Llama", INTERNLM2_1_8B, 2.21), ("Phi3", PHI3_MINI, 4.15)],
    ids=["1B", "2B", "4B"],
)
def test_mini_internvl_has_the_published_number_of_parameters(
    kind: str, sizes: dict[str, Any], published_billions: float
) -> None:
    # As the model hub shows them for InternVL2-1B, 2B and 4B. InternLM2 is counted as the Llama of its shape.
    language = on_meta(kind, {**sizes, "tie_word_embeddings": False})
    mlp = connector("pixel_shuffle_mlp", 1024, sizes["hidden_size"], (32, 32))
    assert round((internvit_300m() + count(mlp) + count(language)) / 1e9, 2) == published_billions


def test_the_1b_model_has_the_published_parts_of_internvl_2_5() -> None:
    # InternVL2.5-1B is the same model with 19 more tokens: 938.19M, of which 304.01M and 629.70M.
    language = on_meta("Qwen2", {**QWEN2_HALF_B, "vocab_size": 151674, "tie_word_embeddings": False})
    parts = [internvit_300m(), count(language), count(connector("pixel_shuffle_mlp", 1024, 896, (32, 32)))]
    assert [round(part / 1e6, 2) for part in (*parts[:2], sum(parts))] == [304.01, 629.70, 938.19]


def test_tiny_gpt_v_has_2_8_billion_parameters_in_its_language_model_and_projections() -> None:
    # "2.8B" counts Phi-2 with the added norms and the two projections. With EVA-CLIP's ViT-g and the Q-Former, which
    # the paper keeps frozen, the whole model has 3.9 billion.
    plain = on_meta("Phi", PHI2)
    language = on_meta("Phi", {**PHI2, "qk_layernorm": True}, qk_norm=True, post_norm=True)
    assert count(plain) == 2_779_683_840  # Phi-2's card: 2.78B
    assert count(language) - count(plain) == 32 * (4 * 80 + 2560)
    q_former = connector("qformer", 1408, 2560, (16, 16), bottleneck_width=4096)
    projections = count(q_former.get_submodule("projection"))
    assert round((count(language) + projections) / 1e9, 1) == 2.8
    with torch.device("meta"):
        vision = timm.create_model("eva_giant_patch14_224", num_classes=0)
    assert round((count(language) + count(q_former) + count(vision)) / 1e9, 1) == 3.9


def test_the_q_former_has_as_many_parameters_as_that_of_transformers() -> None:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    q_former = connector("qformer", 1408, 2560, (16, 16))
    own = count(q_former) - count(q_former.get_submodule("projection")) - count(q_former.get_submodule("vision_norm"))
    with torch.device("meta"):
        theirs = count(Blip2QFormerModel(Blip2QFormerConfig(use_qformer_text_input=False)))
    assert own == theirs + 32 * 768 == 105_162_240
