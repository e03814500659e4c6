"""How long a small VLM takes to answer, on this machine: the figures of MobileVLM's Table 6 (arXiv 2312.16886).

Legend: as in distill/vlm/model.py.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.vlm.batch import VLMBatch
from distill.vlm.model import SmallVLM

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class LatencyReport:
    """Medians over repeated answers to one prompt.

    Attributes:
        device: what computed.
        threads: of the CPU; 0 on an accelerator.
        dtype: of the language model's weights.
        repeats: measured answers.
        tiles: of the prompt's images.
        image_tokens: embeddings that the tiles became.
        prompt_tokens: text and image tokens together.
        new_tokens: generated ones.
        encoder_ms: the encoder, for one tile.
        connector_ms: the connector, for one tile.
        first_token_ms: from the pixels to the first new token: encoder, connector and language model.
        prompt_tokens_per_s: the language model over the prompt.
        new_tokens_per_s: the language model, token by token.
        total_s: the whole answer.
        peak_memory_bytes: on an accelerator, the most that was allocated while answering; on the CPU the process's
            largest resident size since its start, which includes loading.
    """

    device: str
    threads: int
    dtype: str
    repeats: int
    tiles: int
    image_tokens: int
    prompt_tokens: int
    new_tokens: int
    encoder_ms: float
    connector_ms: float
    first_token_ms: float
    prompt_tokens_per_s: float
    new_tokens_per_s: float
    total_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Times:
    """Seconds of one answer's parts."""

    encoder: float
    connector: float
    prompt: float
    decoding: float


@torch.inference_mode()
def measure_latency(
    model: SmallVLM, batch: VLMBatch, *, new_tokens: int = 64, repeats: int = 5, warm_ups: int = 1
) -> LatencyReport:
    """Answer one prompt several times, greedily, and return the medians.

    Each answer has exactly `new_tokens` tokens: ends are ignored, so that models are compared at equal length.

    Args:
        model: on the device to be measured, in the precision to be measured; left in eval mode.
        batch: one row, one prompt, at least one tile, on the model's device.
        new_tokens: at least 2.
        repeats: measured answers, at least 1.
        warm_ups: answers before them that are not counted; accelerators choose their kernels there.

    Raises:
        ConfigError: `new_tokens` or `repeats` is too small.
        DataError: the batch has several rows or samples, padding, or no tile.
    """
    if new_tokens < 2 or repeats < 1 or warm_ups < 0:
        raise ConfigError(
            f"new_tokens {new_tokens}, repeats {repeats}, warm_ups {warm_ups}: at least 2, 1 and 0 are needed."
        )
    if len(batch.input_ids) != 1 or bool((batch.segment_ids != 1).any()) or len(batch.tiles) == 0:
        raise DataError(
            f"Latency is measured for one prompt with an image and no padding; this batch has {len(batch.input_ids)} "
            f"rows, segments {batch.segment_ids.unique().tolist()} and {len(batch.tiles)} tiles."
        )
    if model.noise is not None:
        raise ConfigError("A model whose features are noise does not run its encoder; measure the one without.")
    device = batch.input_ids.device
    model.eval()
    for _ in range(warm_ups):
        _answer(model, batch, new_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_answer(model, batch, new_tokens) for _ in track(range(repeats), description="Answering", transient=True)]
    return _summarise(model, batch, times, new_tokens, device)


def _answer(model: SmallVLM, batch: VLMBatch, new_tokens: int) -> _Times:
    device = batch.input_ids.device
    connector_dtype = next(model.connector.parameters()).dtype
    (prefix, patches), encoder = _timed(lambda: model.features(batch.tiles), device)
    images, connector = _timed(lambda: model.connector(prefix.to(connector_dtype), patches.to(connector_dtype)), device)
    language: Any = model.language
    # As `generate` does: of the prompt, only the last position's scores are computed.
    last_only = {"logits_to_keep": 1} if model.keeps_logits else {}

    def read_prompt() -> tuple[Tensor, Any]:
        embeddings = model.place(batch, images.flatten(0, 1))
        return _greedy(language(inputs_embeds=embeddings, use_cache=True, **last_only))

    first, prompt = _timed(read_prompt, device)
    _, decoding = _timed(lambda: _decode(language, first, new_tokens - 1), device)
    return _Times(encoder, connector, prompt, decoding)


def _greedy(output: Any) -> tuple[Tensor, Any]:
    """Return the likeliest next token `[1, 1]` and the cache."""
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _decode(language: Any, state: tuple[Tensor, Any], steps: int) -> None:
    token, cache = state
    for _ in range(steps):
        token, cache = _greedy(language(input_ids=token, past_key_values=cache, use_cache=True))


def _timed(run: Callable[[], _Made], device: torch.device) -> tuple[_Made, float]:
    """Return what a function returns, and the seconds until the device has done its work."""
    _wait(device)
    start = time.perf_counter()
    made = run()
    _wait(device)
    return made, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summarise(
    model: SmallVLM, batch: VLMBatch, times: list[_Times], new_tokens: int, device: torch.device
) -> LatencyReport:
    tiles, prompt_tokens = len(batch.tiles), batch.input_ids.shape[1]
    encoder, connector, prompt, decoding = (
        statistics.median(getattr(time, part) for time in times)
        for part in ("encoder", "connector", "prompt", "decoding")
    )
    is_cuda = device.type == "cuda"
    return LatencyReport(
        device=torch.cuda.get_device_name(device) if is_cuda else str(device),
        threads=0 if is_cuda else torch.get_num_threads(),
        dtype=str(next(model.language.parameters()).dtype).removeprefix("torch."),
        repeats=len(times),
        tiles=tiles,
        image_tokens=int((batch.input_ids == model.image_token_id).sum()),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        encoder_ms=1000 * encoder / tiles,
        connector_ms=1000 * connector / tiles,
        first_token_ms=1000 * (encoder + connector + prompt),
        prompt_tokens_per_s=prompt_tokens / prompt,
        new_tokens_per_s=(new_tokens - 1) / decoding,
        total_s=statistics.median(time.encoder + time.connector + time.prompt + time.decoding for time in times),
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if is_cuda else _largest_resident_size(),
    )


def _largest_resident_size() -> int:
    """Return the process's largest resident size so far, bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB
