"""Practice data: generated questions, captions, documents and texts, and language models of toy size to train on them.

Nothing is downloaded. A small VLM of a few hundred thousand parameters learns to answer these questions in a minute on
a CPU, which is enough to run every recipe from end to end and to see whether an encoder's features carry its answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from distill.data.pack.durable import durable_file
from distill.errors import ConfigError
from distill.vlm.question_scenes import WORDS
from distill.vlm.questions import Question, QuestionConfig, draw_questions, question_texts, write_questions
from distill.vlm.templates import TEMPLATES
from distill.vlm.tokens import tiny_tokenizer

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
}
"""The architectures of the recipes: MobileLLaMA, Qwen2-0.5B and Phi-2, at `TINY`'s size."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
VOCABULARY = 704
CAPTIONS = {
    "word": 'The word "{}" is written in the image.',
    "chart_type": "This is a {} chart.",
    "chart_value": "A chart whose tallest bar has the value {}.",
    "count": "An image with discs; their number is {}.",
}


def write_practice(
    out: Path, *, train: int, heldout: int, img_size_px: int, seed: int, language: Sequence[str], words: int = 4
) -> dict[str, Path]:
    """Write practice data and toy language models to a folder, and return what was written, by name.

    train.jsonl and heldout.jsonl are questions; words.jsonl, captions.jsonl, documents.jsonl and texts.jsonl are
    made of the training questions. language/NAME holds a configuration and a tokenizer, for `language.random_init`.

    Args:
        out: the folder; made where it is missing.
        train: training questions of each kind.
        heldout: held-out questions of each kind; no scene is in both.
        img_size_px: side of the square images.
        seed: another seed draws other scenes.
        language: which of `LANGUAGE_MODELS` to write.
        words: how many different words there are to read; more are harder to tell apart.

    Raises:
        ConfigError: an argument is out of range, or the folder cannot be written.
    """
    unknown = [name for name in language if name not in LANGUAGE_MODELS]
    if unknown:
        raise ConfigError(f"Unknown language model {unknown[0]!r}; choose of {', '.join(LANGUAGE_MODELS)}.")
    if not 2 <= words <= len(WORDS):
        raise ConfigError(f"words is {words}; it must be from 2 to {len(WORDS)}.")
    training = QuestionConfig(questions_per_kind=train, split="train", img_size_px=img_size_px, seed=seed)
    held_out = replace(training, questions_per_kind=heldout, split="heldout")
    try:
        out.mkdir(parents=True, exist_ok=True)
        questions = draw_practice(training, words)
        written = {"train": write_questions(questions, out, "train")}
        written["heldout"] = write_questions(draw_practice(held_out, words), out, "heldout")
        for name, records in practice_documents(questions, seed).items():
            written[name] = out / f"{name}.jsonl"
            with durable_file(written[name]) as file:
                file.writelines(json.dumps(record).encode() + b"\n" for record in records)
        for name in language:
            written[name] = write_language_model(out / "language" / name, name)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}. Free space, or name another folder.") from error
    return written


def draw_practice(config: QuestionConfig, words: int) -> list[Question]:
    """Return questions, kinds in turn, of which those on words have the first so many words alone."""
    others = tuple(kind for kind in config.kinds if kind != "word")
    wanted = config.questions_per_kind
    # Answers are dealt in turn, so that of every len(WORDS) questions `words` are kept.
    drawn = draw_questions(replace(config, kinds=("word",), questions_per_kind=math.ceil(wanted / words) * len(WORDS)))
    kept = [question for question in drawn if question.answer in WORDS[:words]][:wanted]
    rest = draw_questions(replace(config, kinds=others))
    return [
        question
        for number in range(wanted)
        for question in (kept[number], *rest[number * len(others) :][: len(others)])
    ]


def practice_documents(questions: Sequence[Question], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return, as records: the questions on words again; captions; documents of two captioned images each; texts."""
    images = [f"train/{question.conversation.id}.png" for question in questions]
    captions = [CAPTIONS[question.kind].format(question.answer) for question in questions]
    order = np.random.default_rng(seed).permutation(len(questions)).tolist()
    pairs = list(zip(order[0::2], order[1::2], strict=False))
    return {
        "words": [question_record(question) for question in questions if question.kind == "word"],
        "captions": [{"image": image, "caption": text} for image, text in zip(images, captions, strict=True)],
        "documents": [
            {"text": f"<image>\n{captions[a]}\n<image>\n{captions[b]}", "images": [images[a], images[b]]}
            for a, b in pairs
        ],
        "texts": [{"text": f"{captions[a]} {captions[b]}"} for a, b in pairs],
    }


def question_record(question: Question) -> dict[str, Any]:
    """Return a training question as a record beside train.jsonl."""
    turns = [
        {"from": "gpt" if turn.role == "assistant" else "human", "value": turn.text}
        for turn in question.conversation.turns
    ]
    name = question.conversation.id
    return {"id": name, "image": f"train/{name}.png", "conversations": turns, "kind": question.kind}


def write_language_model(folder: Path, name: str) -> Path:
    """Write the configuration and the tokenizer of a toy language model; its weights are drawn when it is trained."""
    from transformers import AutoConfig

    # The templates' system messages are in, or each of their bytes would be a token.
    systems = dict.fromkeys(template.system_message for template in TEMPLATES.values())
    texts = [*question_texts(), *CAPTIONS.values(), *filter(None, systems)]
    tokenizer = tiny_tokenizer(folder, texts * 4, VOCABULARY)
    settings: Mapping[str, Any] = {**TINY, **LANGUAGE_MODELS[name]}
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    AutoConfig.for_model(**settings, **ids, vocab_size=len(tokenizer)).save_pretrained(str(folder))
    return folder


def print_practice(written: Mapping[str, Path], console: Console) -> None:
    """Print what was written."""
    for name, path in written.items():
        console.print(f"{name:>10}  {path}", highlight=False, markup=False, soft_wrap=True)
