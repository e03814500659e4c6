"""The language model of a small VLM: any causal language model of transformers, frozen, with LoRA, or trained whole.

Directories are local, nothing is downloaded, and no code that lies in a directory is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from distill.errors import ConfigError, WeightsError
from distill.vlm.phi_norms import add_post_norms, check_phi

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LanguageConfig:
    """Which language model, and what of it is trained.

    Attributes:
        path: directory with config.json and safetensors weights of a causal language model that transformers knows:
            Llama (MobileLLaMA), Qwen2, Phi (Phi-2), Phi3, ... InternLM2 is none of these; convert it to Llama's layout.
        random_init: take config.json only, and weights at random: for tests and counting.
        tune: "frozen", "lora" or "full".
        lora_rank: r; 128 in MobileVLM, 64 in TinyGPT-V.
        lora_alpha: updates are scaled by alpha / r; 256 in MobileVLM, 16 in TinyGPT-V.
        lora_dropout: in front of the updates; 0.05 in both.
        lora_targets: last parts of the names of the Linears with LoRA. None: all but the output head, as MobileVLM has.
            TinyGPT-V: q_proj, k_proj, v_proj, dense.
        train_norms: train the norms of a language model that is frozen or has LoRA: TinyGPT-V's stages do.
        qk_norm: LayerNorm of queries and keys, head by head (TinyGPT-V); Phi only.
        post_norm: RMSNorm of the attention's output (TinyGPT-V); Phi only.
        attention: transformers' implementation; packed batches need one that takes a mask.
        dtype: of the weights in memory.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        ConfigError: a number is out of range, or options contradict each other.
    """

    path: Path
    random_init: bool = False
    tune: Literal["frozen", "lora", "full"] = "full"
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    lora_targets: Sequence[str] | None = None
    train_norms: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"language.lora_rank {self.lora_rank}, lora_alpha {self.lora_alpha} and lora_dropout "
                f"{self.lora_dropout}: the first two must be positive, the last from 0 to below 1."
            )
        if self.train_norms and self.tune == "full":
            raise ConfigError("language.train_norms is for tune frozen or lora; full trains the norms anyway.")


def load_language_model(config: LanguageConfig, vocabulary_size: int | None = None) -> nn.Module:
    """Return the language model with its weights, on the CPU, what is not trained frozen.

    Args:
        config: which one.
        vocabulary_size: number of the tokenizer's tokens; embeddings for those that the model lacks are appended, each
            the mean of the others.

    Returns:
        A `transformers.PreTrainedModel`; with LoRA a `peft.PeftModel` around it.

    Raises:
        ConfigError: transformers or peft is not installed, or the directory holds no model that transformers knows.
        WeightsError: weights are missing, damaged or do not fit.
    """
    model_config = read_model_config(config)
    if config.random_init:
        return build_language_model(config, model_config, vocabulary_size)
    return _adapt(_read_weights(config, model_config), config, vocabulary_size)


def build_language_model(config: LanguageConfig, model_config: Any, vocabulary_size: int | None = None) -> nn.Module:
    """Return the language model of a transformers configuration with random weights, adapted as `config` says.

    Under `torch.device("meta")` this counts parameters of any size without memory.

    Raises:
        ConfigError: peft is not installed, or an option does not fit the model.
    """
    transformers = _transformers(config)
    model = transformers.AutoModelForCausalLM.from_config(
        model_config, attn_implementation=config.attention, dtype=_DTYPES[config.dtype]
    )
    return _adapt(model, config, vocabulary_size)


def read_model_config(config: LanguageConfig) -> Any:
    """Return the directory's transformers configuration, `qk_norm` entered.

    Raises:
        ConfigError: transformers is not installed, or config.json is missing or of an unknown model.
    """
    transformers = _transformers(config)
    if not (config.path / "config.json").is_file():
        raise ConfigError(
            f"language.path {config.path} has no config.json; give a local directory of a causal language model as "
            "transformers' save_pretrained writes it. Nothing is downloaded."
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(config.path, local_files_only=True)
        known = type(model_config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(_unknown(config.path, str(error))) from error
    if not known:
        raise ConfigError(_unknown(config.path, f"model_type {model_config.model_type!r} is no causal language model"))
    if config.qk_norm:
        check_phi(model_config, "qk_norm")
        model_config.qk_layernorm = True
    return model_config


def _unknown(path: Path, reason: str) -> str:
    first = reason.strip().splitlines()[0] if reason.strip() else "unknown model"
    return (
        f"language.path {path}: transformers cannot build it without the directory's own code, which is not run "
        f"({first}). Take a model that is part of transformers; InternLM2's weights can be converted to Llama's layout."
    )


def _transformers(config: LanguageConfig) -> Any:
    return _import("transformers", f"language.path {config.path}")


def _import(name: str, asker: str) -> Any:
    try:
        return cast(Any, import_module(name))
    except ImportError as error:
        raise ConfigError(f"{asker} needs {name}: pip install 'encoder-distill[vlm]'.") from error


def _read_weights(config: LanguageConfig, model_config: Any) -> nn.Module:
    transformers = _transformers(config)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            config.path,
            config=model_config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=config.attention,
            dtype=_DTYPES[config.dtype],
        )
    except OSError as error:
        raise WeightsError(
            f"language.path {config.path} has no readable safetensors weights ({error}). Fetch it again, or set "
            "language.random_init to train from nothing."
        ) from error
    except Exception as error:  # safetensors and transformers raise kinds of their own for damaged or unfit files
        raise WeightsError(f"language.path {config.path} cannot be loaded: {error}") from error
    # The norms of queries and keys are new in a model that was trained without them.
    missing = sorted(key for key in info["missing_keys"] if not (config.qk_norm and "_layernorm." in key))
    if missing or info["mismatched_keys"]:
        raise WeightsError(
            f"language.path {config.path} does not hold a whole {type(model).__name__}: {len(missing)} tensors missing "
            f"(first: {missing[:1]}), of another shape: {list(info['mismatched_keys'])[:1]}. transformers would fill "
            "them at random. Fetch the directory again."
        )
    return cast(nn.Module, model)


def _adapt(model: nn.Module, config: LanguageConfig, vocabulary_size: int | None) -> nn.Module:
    """Append tokens and norms, put LoRA in, and freeze what is not trained."""
    known: Any = model
    if vocabulary_size is not None and vocabulary_size > known.get_input_embeddings().num_embeddings:
        _append_tokens(known, vocabulary_size)
    if config.post_norm:
        add_post_norms(known)
    if config.gradient_checkpointing:
        # transformers 5 renames it, and warns of the old name.
        enable = getattr(known, "activation_checkpointing_enable", None) or known.gradient_checkpointing_enable
        enable()
    if config.tune == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    adapted = _with_lora(model, config) if config.tune == "lora" else model
    if config.train_norms:
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name.split(".")[-2])
    return adapted


def _append_tokens(model: Any, vocabulary_size: int) -> None:
    """Append rows to the embedding and the head: means of the present ones, so that no new token stands out."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[before:] = layer.weight[:before].mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[before:] = layer.bias[:before].mean()


def _with_lora(model: nn.Module, config: LanguageConfig) -> nn.Module:
    peft = _import("peft", "language.tune lora")
    targets = "all-linear" if config.lora_targets is None else list(config.lora_targets)
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a property that is to be renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ConfigError(
            f"language.lora_targets {config.lora_targets} cannot be used ({error}). This model's Linears are "
            f"{', '.join(names)}."
        ) from error


def merge_lora(model: nn.Module) -> nn.Module:
    """Return the language model with LoRA's updates added to its weights, as transformers loads it; others unchanged.

    The argument must not be used afterwards.
    """
    merge = getattr(model, "merge_and_unload", None)
    return cast(nn.Module, merge()) if callable(merge) else model
