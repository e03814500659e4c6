"""Latency of several VLMs on this machine, in one table: the figures of MobileVLM's Table 6 (arXiv 2312.16886)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill.data.pack.durable import durable_file
from distill.errors import ConfigError
from distill.probe.extraction import choose_device
from distill.vlm.answers import read_questions
from distill.vlm.batch import collate
from distill.vlm.build import load_trained
from distill.vlm.latency import LatencyReport, measure_latency
from distill.vlm.runs import VLMRun

FORMAT = "distill-vlm-latency/1"


def time_runs(
    runs: Sequence[Path],
    data: Path,
    *,
    new_tokens: int,
    repeats: int,
    device: str,
    out: Path | None,
    console: Console,
) -> list[LatencyReport]:
    """Time each run's answer to the first question of a file, print a table, and write the figures if wanted.

    Raises:
        ConfigError: a run is not finished, or `out` cannot be written.
        DataError: the question cannot be read, or has no image.
    """
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} must be a .json file in a folder that exists.")
    question = read_questions(data, limit=1)[0]
    reports: list[LatencyReport] = []
    for path in runs:
        built = load_trained(VLMRun(path))
        sample = built.prompt_builder().build_prompt(question.conversation)
        place = choose_device(device)
        built.model.to(place)
        batch = collate([sample], built.pad_id, len(sample.input_ids), pack=False).to(place)
        reports.append(measure_latency(built.model, batch, new_tokens=new_tokens, repeats=repeats))
    console.print(latency_table(runs, reports))
    if out is not None:
        rows = [{"run": str(run), **asdict(report)} for run, report in zip(runs, reports, strict=True)]
        with durable_file(out) as file:
            file.write(json.dumps({"format": FORMAT, "question": question.id, "runs": rows}, indent=1).encode())
    return reports


def latency_table(runs: Sequence[Path], reports: Sequence[LatencyReport]) -> Table:
    """Return the figures as a table, a line a run."""
    first = reports[0]
    place = f"{first.device}, {first.threads} thread(s)" if first.threads else first.device
    title = f"Medians of {first.repeats} answers of {first.new_tokens} tokens; {place}"
    names = ("run", "tiles", "image tokens", "prompt tokens", "encoder ms/tile", "connector ms/tile", "first token ms")
    table = Table(*names, "prompt tok/s", "answer tok/s", "total s", "peak MiB", title=title)
    for run, report in zip(runs, reports, strict=True):
        table.add_row(
            run.resolve().name,
            str(report.tiles),
            str(report.image_tokens),
            str(report.prompt_tokens),
            f"{report.encoder_ms:.2f}",
            f"{report.connector_ms:.2f}",
            f"{report.first_token_ms:.2f}",
            f"{report.prompt_tokens_per_s:.1f}",
            f"{report.new_tokens_per_s:.1f}",
            f"{report.total_s:.3f}",
            f"{report.peak_memory_bytes / 2**20:,.0f}",
        )
    return table
