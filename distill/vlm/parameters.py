"""How many parameters a small VLM has, part by part, and how many of them are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from distill.vlm.model import SmallVLM


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; those that parts share, as a tied output head, are counted once.

    Attributes:
        vision: of the encoder.
        connector: of the connector.
        language: of the language model, LoRA and added norms included.
        lora: of LoRA alone.
        trained: what the parts' own `tune` leaves to be trained; a stage may train less.
    """

    vision: int
    connector: int
    language: int
    lora: int
    trained: int

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.vision + self.connector + self.language

    @property
    def lora_percent(self) -> float:
        """LoRA's parameters in percent of the language model's without it, as MobileVLM states them."""
        return 100 * self.lora / (self.language - self.lora)

    def __str__(self) -> str:
        parts = f"encoder {_millions(self.vision)}, connector {_millions(self.connector)}"
        lora = f" (LoRA {_millions(self.lora)}, {self.lora_percent:.2f} %)" if self.lora else ""
        language = f"language model {_millions(self.language)}{lora}"
        return f"{_millions(self.total)} parameters: {parts}, {language}; {_millions(self.trained)} may be trained"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def count_parameters(model: SmallVLM) -> ParameterCounts:
    """Return the numbers of parameters of each part; modules on the meta device count as well as real ones."""
    return ParameterCounts(
        vision=count(model.vision),
        connector=count(model.connector),
        language=count(model.language),
        lora=count_lora(model.language),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )


def count(module: nn.Module) -> int:
    """Return the number of a module's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_lora(module: nn.Module) -> int:
    """Return the number of parameters that peft's LoRA has added."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if ".lora_" in name)
