"""The verb `distill vlm`: a small VLM around an encoder, trained, scored, timed and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from distill.errors import ConfigError
from distill.stop_signals import close_stop_signals, stop_signals

Device = Literal["auto", "cpu", "cuda", "mps"]
LanguageName = Literal["llama", "qwen2", "phi"]
WIDTH = 100


def practice(
    out: Path,
    train: int = 1200,
    heldout: int = 100,
    img_size_px: int = 64,
    seed: int = 0,
    language: list[LanguageName] | None = None,
    words: int = 4,
) -> None:
    """Write generated questions with known answers, and toy language models to train on them.

    Args:
        out: folder for train.jsonl, heldout.jsonl, words.jsonl (the training questions on words again), captions.jsonl,
            documents.jsonl, texts.jsonl and language/NAME.
        train: training questions of each of four kinds.
        heldout: held-out questions of each kind; no scene is in both.
        img_size_px: side of the square images.
        seed: another seed draws other scenes.
        language: architectures of the toy language models; all of llama, qwen2 and phi when left out.
        words: how many different words there are to read, up to 8; more are harder to tell apart.

    Raises:
        ConfigError: an argument is out of range, or the folder cannot be written.
    """
    from distill.vlm.practice import LANGUAGE_MODELS, print_practice, write_practice

    names = list(LANGUAGE_MODELS) if language is None else list(language)
    sizes = {"train": train, "heldout": heldout, "img_size_px": img_size_px, "seed": seed, "words": words}
    written = write_practice(out, **sizes, language=names)
    print_practice(written, Console())


def fit(recipe: list[str] | None = None, resume: Literal["auto", "no"] = "no") -> None:
    """Train a small VLM by the stages of a recipe, on one device.

    Args:
        recipe: gathered from `--config FILE` (several are merged, later ones winning) and the recipe's own flags, such
            as `--vision.path DIR`, `--run_dir DIR` or `--stages.align.steps 100`.
        resume: auto goes on where the run in run_dir stands, or begins one; no begins anew, and moves what lies there
            to earlier-N/.

    Raises:
        ConfigError: the recipe or a flag has a value that cannot work.
        DataError: the stages' data cannot be used.
        WeightsError: weights are missing, damaged or do not fit.
        UnfinishedError: told to stop; what was done is saved.
    """
    from distill.vlm.recipe import read_recipe

    stop_signals()  # before anything slow is imported
    try:
        parsed, content = read_recipe(recipe or [])
        from distill.vlm.stages.run import run_recipe

        run_recipe(parsed, content, resume=resume, console=Console(width=WIDTH))
    finally:
        close_stop_signals()


def score(
    run: Path,
    *,
    data: Path,
    out: Path | None = None,
    image_folder: Path | None = None,
    noise: bool = False,
    limit: int | None = None,
    batch_size: int = 32,
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Ask a trained VLM the questions of a file, and score its answers with intervals.

    Args:
        run: the folder of a finished `distill vlm fit`.
        data: questions, a .jsonl file in LLaVA's layout; a record may have `kind`, `metric`, `answers` and `options` as
            well.
        out: folder for probe.json and the predictions; when left out the run's, or with --noise RUN/noise.
        image_folder: where the records' image names start; the folder of `data` when left out.
        noise: replace the encoder's features by noise: what is left of the score then is not owed to the images.
        limit: ask only the first so many questions.
        batch_size: questions at a time.
        device: where the model runs; auto takes a GPU when there is one.
        seed: of the intervals' resampling.

    Raises:
        DistillError: the run is not finished, or an option, a question or a weight cannot be used.
    """
    from distill.vlm.scored_run import ScoreOptions, score_run

    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"--batch_size {batch_size} and --limit {limit} must be at least 1.")
    target = out or (run / "noise" if noise else run)
    score_run(
        run, data, target, ScoreOptions(image_folder, noise, limit, batch_size, device, seed), Console(width=WIDTH)
    )


def latency(
    run: Path,
    *,
    data: Path,
    beside: list[Path] | None = None,
    new_tokens: int = 64,
    repeats: int = 5,
    device: Device = "auto",
    out: Path | None = None,
) -> None:
    """Time trained VLMs on this machine: encoder, first token, tokens a second and memory, as MobileVLM's Table 6.

    Args:
        run: the folder of a finished `distill vlm fit`.
        data: questions, of which the first is asked.
        beside: further runs.
        new_tokens: length of each answer, whatever the model would say.
        repeats: answers that are timed; the figures are medians.
        device: where the models run; auto takes a GPU when there is one.
        out: a .json file for the figures.

    Raises:
        ConfigError: a run is not finished, or an option cannot be used.
        DataError: the question cannot be read, or has no image.
    """
    from distill.vlm.latency_table import time_runs

    runs = [run, *(beside or [])]
    time_runs(runs, data, new_tokens=new_tokens, repeats=repeats, device=device, out=out, console=Console())


def adapt(
    annotations: Path,
    *,
    task: Literal["classification", "detection", "referring", "region", "driving"],
    out: Path,
    image_folder: Path | None = None,
    box_format: Literal["xyxy", "xywh"] = "xyxy",
) -> None:
    """Turn a domain's annotations into conversations to train on, as Mini-InternVL adapts to domains.

    Args:
        annotations: a .jsonl file, an annotation a line, or a .json list; docs/vlm.md has the fields of each task.
        task: what is annotated.
        out: folder for records.jsonl and images/, new or empty.
        image_folder: where the annotations' image names start; the folder of `annotations` when left out.
        box_format: xyxy (two corners) or xywh (COCO), in pixels.

    Raises:
        ConfigError: an option cannot be used, or `out` cannot be written.
        DataError: an annotation or an image cannot be read; file and line are named.
    """
    from distill.vlm.adapt import adapt_records, write_records

    try:
        written = write_records(adapt_records(annotations, task, image_folder, box_format=box_format), out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}. Free space, or name another folder.") from error
    Console().print(f"Written: {written}", highlight=False, markup=False, soft_wrap=True)


def export(run: Path, *, out: Path) -> None:
    """Write a trained VLM's parts for use elsewhere: language model (LoRA merged), connector, and a trained encoder.

    Args:
        run: the folder of a finished `distill vlm fit`.
        out: a new folder for language/, connector.safetensors, vision/ where the encoder was trained, and vlm.json.

    Raises:
        DistillError: the run is not finished, cannot be exported, or `out` is there or cannot be written.
    """
    from distill.vlm.export import export_vlm

    export_vlm(run, out, Console())


vlm = {"practice": practice, "fit": fit, "score": score, "latency": latency, "adapt": adapt, "export": export}
"""What stands after `distill vlm`."""
