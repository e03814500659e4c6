"""Latency: what is timed, how often, and what is refused."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distill.encoder import Layer
from distill.errors import ConfigError, DataError
from distill.vlm import latency
from distill.vlm.batch import VLMBatch, VLMSample, collate
from distill.vlm.connectors import ConnectorConfig, build_connector
from distill.vlm.latency import measure_latency
from distill.vlm.model import SmallVLM

IMAGE = 5


class Clock:
    """Time that passes only in the parts of the model, so that each figure is known beforehand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Encoder(nn.Module):
    embed_dim, depth, layer_dims, patch_size, num_prefix_tokens = 8, 1, (8,), 7, 1

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 7, 7)
        self.clock, self.calls = clock, 0

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        self.clock.now += 0.010 * len(images)
        self.calls += 1
        patches = self.patch(images.float() / 255).permute(0, 2, 3, 1)
        return [(patches[:, :1, 0], patches)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


@pytest.fixture
def model(clock: Clock) -> SmallVLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    language = LlamaForCausalLM(config)
    connector = build_connector(ConnectorConfig(), 8, 16, (4, 4))
    vlm = SmallVLM(Encoder(clock), connector, language, IMAGE)

    def spend(seconds: float) -> Any:
        def hook(*_: object) -> None:
            clock.now += seconds

        return hook

    connector.register_forward_hook(spend(0.004))

    def read(_module: nn.Module, _args: tuple[()], words: dict[str, Any], _output: object) -> None:
        is_prompt = words.get("inputs_embeds") is not None
        assert is_prompt or words.get("past_key_values") is not None
        clock.now += 0.5 if is_prompt else 0.02

    language.register_forward_hook(read, with_kwargs=True)
    return vlm


def prompt(tiles: int = 2, text: int = 6) -> VLMBatch:
    ids = [*[IMAGE] * (4 * tiles), *[7] * text]
    pixels = torch.zeros(tiles, 3, 28, 28, dtype=torch.uint8)
    return collate([VLMSample(ids, [-100] * len(ids), pixels, "prompt")], 0, 64, pack=False)


def test_each_part_is_timed_by_itself_and_the_encoder_runs_once_an_answer(model: SmallVLM) -> None:
    report = measure_latency(model, prompt(), new_tokens=11, repeats=3, warm_ups=2)
    assert cast(Any, model.vision).calls == 5
    assert (report.tiles, report.image_tokens, report.prompt_tokens, report.new_tokens) == (2, 8, 14, 11)
    assert report.encoder_ms == pytest.approx(10)
    assert report.connector_ms == pytest.approx(2)  # one call of 4 ms for two tiles
    assert report.first_token_ms == pytest.approx(20 + 4 + 500)
    assert report.prompt_tokens_per_s == pytest.approx(14 / 0.5)
    assert report.new_tokens_per_s == pytest.approx(50)  # 10 tokens after the first, 0.02 s each
    assert report.total_s == pytest.approx(0.02 + 0.004 + 0.5 + 10 * 0.02)
    assert (report.device, report.dtype, report.repeats) == ("cpu", "float32", 3)
    assert report.threads == torch.get_num_threads()
    assert 1e7 < report.peak_memory_bytes < 1e12


def test_the_tokens_timed_are_those_that_generate_gives(model: SmallVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    greedy = latency._greedy

    def watch(output: Any) -> Any:
        token, cache = greedy(output)
        seen.append(int(token))
        return token, cache

    monkeypatch.setattr(latency, "_greedy", watch)
    measure_latency(model, prompt(), new_tokens=6, repeats=1, warm_ups=0)
    assert [seen] == model.generate(prompt(), 6, [], eos_token_id=None)


def test_what_would_measure_something_else_is_refused(model: SmallVLM) -> None:
    with pytest.raises(ConfigError, match="new_tokens 1"):
        measure_latency(model, prompt(), new_tokens=1)
    text = VLMSample([3, 4], [-100] * 2, torch.zeros(0, 3, 28, 28, dtype=torch.uint8), "text")
    with pytest.raises(DataError, match="1 rows, .* and 0 tiles"):
        measure_latency(model, collate([text], 0, 64, pack=False))
    image = VLMSample([IMAGE] * 4, [-100] * 4, torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "image")
    with pytest.raises(DataError, match="2 rows"):
        measure_latency(model, collate([text, image], 0, 64, pack=False))
    noisy = SmallVLM(model.vision, model.connector, model.language, IMAGE, noise_features=True)  # type: ignore
    with pytest.raises(ConfigError, match="does not run its encoder"):
        measure_latency(noisy, prompt())
