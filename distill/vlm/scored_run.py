"""Scoring a finished run, as it is or with noise in place of its encoder's features."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from distill.checkpoint import RunDir
from distill.encoder import Encoder
from distill.errors import ConfigError
from distill.probe.encoders import run_of
from distill.probe.extraction import choose_device
from distill.vlm.answers import Answer, ask, read_questions, right_option
from distill.vlm.build import BuiltVLM, load_trained
from distill.vlm.conversation import IMAGE_PLACE
from distill.vlm.figures import pope_results
from distill.vlm.predictions import Prediction, write_lmms_eval, write_vlmevalkit
from distill.vlm.runs import VLMRun
from distill.vlm.score_files import print_scores, write_scores
from distill.vlm.scoring.choice import LETTERS
from distill.vlm.vision import MANIFEST, VisionConfig

NOISE_NAME = "noise"
CIRCLE_STEP = 1_000_000
"""What VLMEvalKit adds to a question's index for each further order of its options."""


@dataclass(frozen=True)
class ScoreOptions:
    """How a model is asked.

    Attributes:
        image_folder: where the records' image names start; None means the folder of the questions.
        noise: replace the encoder's features by noise.
        limit: ask only the first so many questions.
        batch_size: questions at a time.
        device: where the model runs.
        seed: of the intervals' resampling.
    """

    image_folder: Path | None = None
    noise: bool = False
    limit: int | None = None
    batch_size: int = 32
    device: str = "auto"
    seed: int = 0


def score_run(path: Path, data: Path, out: Path, options: ScoreOptions, console: Console) -> dict[str, Any]:
    """Ask a run's model the questions of a file, write what it scores to OUT/probe.json, and return that.

    The answers themselves go to OUT/predictions.

    Raises:
        ConfigError: the run is not finished, or `out` cannot be written.
        DataError: a question cannot be read.
        WeightsError: weights are missing, damaged or do not fit.
    """
    run = VLMRun(path)
    questions = read_questions(data, options.image_folder, options.limit)
    with console.status("loading the model"):
        built = load_trained(run, noise_features=options.noise)
    answers = ask(built, questions, batch_size=options.batch_size, device=choose_device(cast(Any, options.device)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}. Name another folder.") from error
    prompts = built.prompt_builder()
    settings = {
        "vlm": str(path),
        "vlm_seed": built.recipe.seed,
        "connector": built.recipe.connector.name,
        "tokens_per_tile": prompts.tokens_per_tile,
        "tile_size_px": prompts.tiling.tile_size,
    }
    facts = encoder_facts(built)
    result = write_scores(answers, out / "probe.json", encoder=facts, data=data, seed=options.seed, settings=settings)
    console.print(f"Encoder: {facts['name']} ({facts['source']})", highlight=False, markup=False, soft_wrap=True)
    print_scores(result, console)
    figures = {entry["metric"]: float(entry["value"]) for entry in result["encoders"][0]["scores"]}
    for file in (out / "probe.json", *write_predictions(answers, out, path, data, figures)):
        console.print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)
    return result


def write_predictions(
    answers: Sequence[Answer], out: Path, run: Path, data: Path, figures: Mapping[str, float]
) -> list[Path]:
    """Write the answers to OUT/predictions as VLMEvalKit and lmms-eval read them, and return the files.

    Raises:
        ConfigError: a file cannot be written.
    """
    model, benchmark = (re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "run" for name in (run.resolve().name, data.stem))
    predictions = predictions_of(answers)
    folder, results = out / "predictions", {**figures, **pope_results(answers)}
    try:
        kit = write_vlmevalkit(predictions, folder / "vlmevalkit", model, benchmark)
        eval_file = write_lmms_eval(predictions, folder / "lmms_eval", model, benchmark, datetime.now(UTC), results)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Free space, or give another --out.") from error
    return [*kit, eval_file]


def predictions_of(answers: Sequence[Answer]) -> list[Prediction]:
    """Return the answers as benchmarks number them: records in turn, each order of a circular one a million further."""
    found: list[Prediction] = []
    places: dict[str, list[int]] = {}
    for answer in answers:
        question = answer.question
        orders = places.setdefault(question.circle or question.id, [])
        orders.append(len(places) - 1 if not orders else orders[-1] + CIRCLE_STEP)
        letter = LETTERS[right_option(question.answers[0], question.options)] if question.options else ""
        found.append(
            Prediction(
                orders[-1],
                question.conversation.question.turns[-1].text.replace(IMAGE_PLACE, "").strip(),
                (letter,) if letter else question.answers,
                answer.text,
                answer.value,
                options=question.options,
                category=question.kind,
            )
        )
    return found


def encoder_facts(built: BuiltVLM) -> dict[str, Any]:
    """Return name, role, source, width and parameters of the encoder inside a VLM, as probe.json holds them."""
    config, encoder = built.recipe.vision, built.model.vision
    role = "other" if built.model.noise is not None else role_of(config)
    name = config.path.resolve().name
    if run_of(config.path) == config.path:
        name = f"{name}/{config.student or RunDir(config.path).student_names[0]}"
    suffix = f" ({NOISE_NAME})" if built.model.noise is not None else " (initial)" if role == "initial" else ""
    return {
        "name": name + suffix,
        "role": role,
        "source": str(config.path),
        "embed_dim": cast(Encoder, encoder).embed_dim,
        "num_params": sum(parameter.numel() for parameter in encoder.parameters()),
    }


def role_of(config: VisionConfig) -> str:
    """Return "initial" or "student" for an encoder of a distillation run, as it says itself; else "other"."""
    run = run_of(config.path)
    if run == config.path:
        return "initial" if config.which == "initial" else "student"
    file = config.path / MANIFEST
    if not file.is_file():
        return "other"
    try:
        which = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8"))).get("which")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); export again.") from error
    return "initial" if which == "initial" else "student"
