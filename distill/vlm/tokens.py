"""Tokenizers of language models on disk, with the tokens a template needs; and tiny ones, built from given text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distill.errors import ConfigError
from distill.vlm.chat import Tokenizer
from distill.vlm.templates import IMAGE_TOKEN, TEMPLATES, Template

PAD, BOS, END = "<pad>", "<s>", "</s>"


def load_tokenizer(path: Path, template: Template, image_token: str | None = None) -> Tokenizer:
    """Return the tokenizer of a local language model, knowing the template's special tokens and the image token.

    Tokens that it lacks are added behind its vocabulary; so are a language model's embeddings to be, up to
    `len(tokenizer)`.

    Args:
        path: folder of the language model or of its tokenizer; nothing is downloaded.
        template: whose special tokens are needed.
        image_token: stands for one image embedding; None means `<IMG_CONTEXT>`.

    Raises:
        ConfigError: the folder holds no tokenizer, it is no fast one, or it has no token that could pad.
    """
    from transformers import AutoTokenizer  # seconds to import, unless it is needed

    if not Path(path).is_dir():
        raise ConfigError(f"The language model {path} is no folder; name a local folder that holds its tokenizer.")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The folder {path} holds no tokenizer that transformers can load: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"The tokenizer in {path} is a slow one, which tells no character offsets; convert it with transformers to "
            "one with a tokenizer.json."
        )
    add_special_tokens(tokenizer, template, image_token)
    if tokenizer.pad_token is None:
        # Nothing attends to padding, so any token will do; a new one would only grow the vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"The tokenizer in {path} has no pad, eos or unk token; give it one of them.")
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, template: Template, image_token: str | None = None) -> int:
    """Make the template's special tokens and the image token one token each; return how many the tokenizer lacked."""
    wanted = [*template.special_tokens, image_token or IMAGE_TOKEN]
    return int(tokenizer.add_tokens([token for token in wanted if not _is_one(tokenizer, token)], special_tokens=True))


def _is_one(tokenizer: Tokenizer, token: str) -> bool:
    return len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1 and token in tokenizer.get_vocab()


def tiny_tokenizer(path: Path, texts: Iterable[str], vocab_size: int = 384, *, adds_bos: bool = False) -> Tokenizer:
    """Build a byte-level BPE tokenizer from given text and save it as transformers does.

    It knows the special tokens of every template, so that tiny language models can be trained with any of them. Equal
    texts give an equal tokenizer.

    Args:
        path: folder it is written to.
        texts: what its merges are learned from.
        vocab_size: most tokens; some 280 of them are bytes and special tokens.
        adds_bos: begin every text with `<s>`, as Llama's tokenizers do.

    Returns:
        The tokenizer, as `load_tokenizer` gives it.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes and special tokens.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, END, "<|endoftext|>", *_all_special_tokens(), IMAGE_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ConfigError(f"vocab_size {vocab_size} is too small: bytes and special tokens are {len(special) + 256}.")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    if adds_bos:
        fast.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{BOS} $A", special_tokens=[(BOS, special.index(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=BOS, eos_token=END, pad_token=PAD)
    tokenizer.save_pretrained(str(path))
    return tokenizer


def _all_special_tokens() -> list[str]:
    return list(dict.fromkeys(token for template in TEMPLATES.values() for token in template.special_tokens))
