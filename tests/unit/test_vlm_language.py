"""Language models from local directories: what is trained, what is refused, and TinyGPT-V's norms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import ConfigError, WeightsError
from distill.vlm.language import LanguageConfig, load_language_model, merge_lora

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ("Llama", "Qwen2", "Phi", "Phi3")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory a kind, as transformers writes them."""
    import transformers

    made: dict[str, Path] = {}
    for kind in KINDS:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=kind == "Qwen2")
        made[kind] = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
    return made


def logits_of(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    ids = torch.arange(3, 15).view(2, 6) if ids is None else ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained(model: nn.Module) -> set[str]:
    """Return the last two parts of the names of what is trained."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {".".join(name.replace(".default", "").split(".")[-3:-1]) for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_gives_the_model_that_transformers_gives(directories: dict[str, Path], kind: str) -> None:
    import transformers

    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(directories[kind], local_files_only=True))
    for attention in ("sdpa", "eager"):
        model = load_language_model(LanguageConfig(directories[kind], attention=attention))  # type: ignore[arg-type]
        assert (logits_of(model) - expected).abs().max() <= 1e-6
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_weights_are_those_of_the_seed_and_not_of_the_file(directories: dict[str, Path]) -> None:
    config = LanguageConfig(directories["Llama"], random_init=True)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(logits_of(load_language_model(config)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_missing_or_misshapen_tensor_is_an_error_and_not_filled_at_random(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    damaged = shutil.copytree(directories["Llama"], tmp_path / "llama")
    weights = load_file(damaged / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 tensors missing .*up_proj"):
        load_language_model(LanguageConfig(damaged))
    weights["model.layers.1.mlp.up_proj.weight"] = gone[:5].clone()
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"llama"):
        load_language_model(LanguageConfig(damaged))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no readable safetensors"):
        load_language_model(LanguageConfig(damaged))


def test_directories_that_need_their_own_code_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.json"):
        load_language_model(LanguageConfig(tmp_path))
    remote = {
        "model_type": "internlm2",
        "auto_map": {"AutoConfig": "c.InternLM2Config", "AutoModelForCausalLM": "m.InternLM2ForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(remote))
    (tmp_path / "c.py").write_text("raise SystemExit('the code of the directory was run')")
    with pytest.raises(ConfigError, match="InternLM2's weights can be converted to Llama's layout"):
        load_language_model(LanguageConfig(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ConfigError, match="no causal language model"):
        load_language_model(LanguageConfig(tmp_path))


def test_a_frozen_model_trains_nothing_or_its_norms_alone(directories: dict[str, Path]) -> None:
    assert trained(load_language_model(LanguageConfig(directories["Phi"], tune="frozen"))) == set()
    config = LanguageConfig(directories["Phi"], tune="frozen", train_norms=True, qk_norm=True, post_norm=True)
    names = trained(load_language_model(config))
    assert {name.split(".")[-1] for name in names} == {
        "input_layernorm",
        "q_layernorm",
        "k_layernorm",
        "post_layernorm",
        "final_layernorm",
    }


def test_lora_trains_only_its_own_weights_in_every_linear_but_the_head(directories: dict[str, Path]) -> None:
    model = load_language_model(LanguageConfig(directories["Llama"], tune="lora", lora_rank=4, lora_alpha=8.0))
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert trained(model) == {f"{name}.{side}" for name in linears for side in ("lora_A", "lora_B")}
    layer: Any = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert layer.r["default"] == 4
    assert layer.scaling["default"] == 2.0


def test_lora_starts_as_the_model_and_merges_into_one_without_it(directories: dict[str, Path]) -> None:
    plain = logits_of(load_language_model(LanguageConfig(directories["Phi"])))
    model = load_language_model(
        LanguageConfig(directories["Phi"], tune="lora", lora_rank=4, lora_targets=["q_proj", "dense"])
    )
    assert torch.equal(logits_of(model), plain)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    changed = logits_of(model)
    assert (changed - plain).abs().max() > 1e-2
    merged = merge_lora(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits_of(merged) - changed).abs().max() <= 1e-5


def test_lora_targets_that_the_model_lacks_are_refused_with_those_it_has(directories: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"dense, fc1, fc2, k_proj, lm_head, q_proj, v_proj"):
        load_language_model(LanguageConfig(directories["Phi"], tune="lora", lora_targets=["query_key_value"]))


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_the_mean_of_the_others_and_change_no_old_score(directories: dict[str, Path], kind: str) -> None:
    config = LanguageConfig(directories[kind])
    model: Any = load_language_model(config, vocabulary_size=51)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (table is head) == (kind == "Qwen2")
    for weight in (table, head):
        assert len(weight) == 51
        assert torch.allclose(weight[48:], weight[:48].mean(0).expand(3, -1), atol=1e-7)
    assert torch.allclose(logits_of(model)[..., :48], logits_of(load_language_model(config)), atol=1e-6)
    assert len(load_language_model(config, vocabulary_size=30).get_input_embeddings().weight) == 48  # type: ignore


def test_tiny_gpt_v_norms_are_refused_for_other_models(directories: dict[str, Path]) -> None:
    for option in ("qk_norm", "post_norm"):
        with pytest.raises(ConfigError, match=f"language.{option} is TinyGPT-V's change of Phi"):
            load_language_model(LanguageConfig(directories["Llama"], **{option: True}))  # type: ignore[arg-type]


def scaled(model: nn.Module, names: tuple[str, ...], factor: float) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in names:
                parameter.mul_(factor)
    return model


def test_qk_norm_takes_the_scale_of_queries_and_keys_away(directories: dict[str, Path]) -> None:
    for qk_norm in (False, True):
        config = LanguageConfig(directories["Phi"], qk_norm=qk_norm)
        before = logits_of(scaled(load_language_model(config), ("q_proj", "k_proj"), 30.0))
        after = logits_of(scaled(load_language_model(config), ("q_proj", "k_proj"), 300.0))
        assert bool((before - after).abs().max() <= 1e-4) == qk_norm


def test_post_norm_takes_the_scale_of_the_attention_output_away(directories: dict[str, Path]) -> None:
    for post_norm in (False, True):
        config = LanguageConfig(directories["Phi"], post_norm=post_norm)
        before = logits_of(scaled(load_language_model(config), ("v_proj",), 100.0))
        after = logits_of(scaled(load_language_model(config), ("v_proj",), 1000.0))
        assert bool((before - after).abs().max() <= 1e-3) == post_norm


def relative_gradients(model: nn.Module, parts: tuple[str, ...]) -> Tensor:
    """Return, for each weight of these parts, the norm of its gradient times its own: what a relative step changes."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(4, 20, 32, generator=generator)
    targets = torch.randint(0, 48, (4, 6), generator=generator)
    scores = model.train()(inputs_embeds=embeddings, use_cache=False).logits[:, -6:]
    nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()).backward()
    weights = [value for name, value in model.named_parameters() if name.split(".")[-2] in parts and value.ndim == 2]
    assert len(weights) == 2 * len(parts)  # two layers
    return torch.stack([value.grad.norm() * value.detach().norm() for value in weights if value.grad is not None])


@pytest.mark.parametrize(
    ("option", "grown", "start", "growth", "watched"),
    [
        # Without q/k norm: queries and keys grow, the softmax saturates, and they learn nothing any more.
        ("qk_norm", ("q_proj", "k_proj"), 30.0, 100.0, ("q_proj", "k_proj")),
        # Without the norm behind it: attention grows, fills the residual stream, and what is beside it learns nothing.
        ("post_norm", ("v_proj",), 1.0, 1e5, ("fc1", "fc2")),
    ],
)
def test_gradients_vanish_without_tiny_gpt_v_norms_and_stay_with_them(
    directories: dict[str, Path],
    option: str,
    grown: tuple[str, ...],
    start: float,
    growth: float,
    watched: tuple[str, ...],
) -> None:
    left: dict[bool, Tensor] = {}
    for is_on in (False, True):
        config = LanguageConfig(directories["Phi"], **{option: is_on})  # type: ignore[arg-type]
        before = relative_gradients(scaled(load_language_model(config), grown, start), watched)
        after = relative_gradients(scaled(load_language_model(config), grown, start * growth), watched)
        left[is_on] = after / before
    assert left[False].max() <= 1e-2
    assert left[True].min() >= 0.5
    assert left[True].max() <= 2.0


def test_gradient_checkpointing_changes_memory_and_not_gradients(directories: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = load_language_model(LanguageConfig(directories["Phi"], gradient_checkpointing=checkpointing))
        model.train()
        embeddings = torch.ones(1, 5, 32, requires_grad=True)
        model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
        assert model.is_activation_checkpointing == checkpointing
        gradients.append(embeddings.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"lora_rank": 0}, {"lora_alpha": 0.0}, {"lora_dropout": 1.0}, {"train_norms": True}]
)
def test_numbers_out_of_range_and_contradictions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LanguageConfig(Path("none"), **options)


def test_without_peft_lora_says_what_to_install(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"encoder-distill\[vlm\]"):
        load_language_model(LanguageConfig(directories["Llama"], tune="lora"))
