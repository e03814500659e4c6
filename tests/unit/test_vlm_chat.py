"""Templates and labels, token by token."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.vlm.batch import IGNORED_LABEL
from distill.vlm.chat import encode, encode_prompt, label_tokens, render, stop_ids
from distill.vlm.conversation import Conversation, Kind, Turn
from distill.vlm.image_sources import EncodedImage
from distill.vlm.templates import IMAGE_TOKEN, TEMPLATES, Template, find_template
from distill.vlm.tokens import load_tokenizer, tiny_tokenizer

TEXTS = ["What is this? A red cat.", "Describe the image shortly.", "system user assistant"] * 3


def picture() -> EncodedImage:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), "picture")


PICTURE = picture()


def talk(*texts: str, images: int = 0, kind: Kind = "instruction") -> Conversation:
    roles = ["human", "assistant"] * len(texts)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))  # type: ignore[arg-type]
    return Conversation("record 7", turns, (PICTURE,) * images, kind)


def document(text: str, images: int = 0, kind: Kind = "interleaved") -> Conversation:
    return Conversation("document", (Turn("assistant", text),), (PICTURE,) * images, kind)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder, TEXTS)
    return load_tokenizer(folder, find_template("internvl"))


def words(tokenizer: Any, conversation: Conversation, template: str, *tokens: int, limit: int = 10_000) -> list[str]:
    """Tokens as text, those that are labelled in capitals between bars."""
    ids, labels = encode(conversation, tokenizer, plain(template), tokens, IMAGE_TOKEN, limit)
    shown = []
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORED_LABEL, token)
        text = tokenizer.decode([token])
        shown.append(f"|{text}|" if label != IGNORED_LABEL else text)
    return shown


def plain(name: str) -> Template:
    """A template without its system message, which would fill the expectations."""
    from dataclasses import replace

    return replace(find_template(name), system_message="")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "internvl",
            "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is this?<|im_end|><|im_start|>assistant\n"
            "{red cat<|im_end|>}<|im_start|>user\nWhat?<|im_end|><|im_start|>assistant\n{A cat.<|im_end|>}",
        ),
        (
            "internvl2_5",
            "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
            "{red cat<|im_end|>}\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{A cat.<|im_end|>}\n",
        ),
        (
            "phi3",
            "<|user|>\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is this?<|end|><|assistant|>\n"
            "{red cat<|end|>}<|user|>\nWhat?<|end|><|assistant|>\n{A cat.<|end|>}",
        ),
        (
            "vicuna",
            "USER: <IMG_CONTEXT><IMG_CONTEXT>\nWhat is this? ASSISTANT:{ red cat</s>}"
            "USER: What? ASSISTANT:{ A cat.</s>}",
        ),
        (
            "phi2",
            "Instruct: <Img><IMG_CONTEXT><IMG_CONTEXT></Img>\nWhat is this?\nOutput:{ red cat</s>}"
            "Instruct: What?\nOutput:{ A cat.</s>}",
        ),
        ("plain", "<IMG_CONTEXT><IMG_CONTEXT>\nWhat is this?{red cat\n}What?{A cat.\n}"),
    ],
)
def test_answers_and_their_ends_are_labelled_and_nothing_else(tokenizer: Any, template: str, expected: str) -> None:
    conversation = talk("<image>\nWhat is this?", "red cat", "What?", "A cat.", images=1)
    shown = "".join(words(tokenizer, conversation, template, 2))
    assert shown.replace("||", "").replace("|", "$") == _bars(expected).replace("|", "$")


def _bars(expected: str) -> str:
    """Braces to the bars that `words` draws around a run of labelled tokens."""
    return expected.replace("{", "|").replace("}", "|")


def test_label_tokens_takes_tokens_that_lie_in_a_stretch_even_in_part() -> None:
    ids, offsets = [1, 2, 3, 4, 5, 6, 7], [(0, 0), (0, 2), (2, 5), (5, 6), (6, 9), (9, 9), (9, 10)]
    assert label_tokens(ids, offsets, [(3, 5), (6, 7)]) == [-100, -100, 3, -100, 5, -100, -100]


def test_one_character_of_several_tokens_is_labelled_whole(tokenizer: Any) -> None:
    shown = words(tokenizer, talk("What?", "语"), "internvl")
    ids, labels = encode(talk("What?", "语"), tokenizer, plain("internvl"), (), IMAGE_TOKEN, 100)
    answer = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL]
    assert tokenizer.decode(answer) == "语<|im_end|>"
    assert sum(part.startswith("|") for part in shown) == 4  # three bytes and the end


def test_every_image_has_its_own_number_of_tokens(tokenizer: Any) -> None:
    shown = "".join(words(tokenizer, talk("<image> or <image>?", "A", images=2), "internvl", 1, 3))
    assert "<img><IMG_CONTEXT></img> or <img>" + "<IMG_CONTEXT>" * 3 + "</img>?" in shown


def test_video_frames_stand_behind_their_numbers(tokenizer: Any) -> None:
    conversation = talk("Frame1: <image>\nFrame2: <image>\nWhat?", "A", images=2)
    shown = "".join(words(tokenizer, conversation, "internvl", 1, 1))
    assert "Frame1: <img><IMG_CONTEXT></img>\nFrame2: <img><IMG_CONTEXT></img>\nWhat?" in shown


def test_a_document_is_learned_whole_but_for_its_images(tokenizer: Any) -> None:
    shown = words(tokenizer, document("A <image>cat", images=1), "internvl", 2)
    assert "".join(shown).replace("||", "") == "|A |<IMG_CONTEXT><IMG_CONTEXT>|cat</s>|"


def test_a_tokenizer_that_begins_with_bos_gets_it_once_and_unlabelled(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, TEXTS, adds_bos=True)
    tokenizer = load_tokenizer(tmp_path, find_template("vicuna"))
    shown = words(tokenizer, talk("What?", "A"), "vicuna")
    assert shown[0] == "<s>"
    assert shown.count("<s>") == 1


def test_ids_are_those_of_the_whole_text_tokenised_at_once(tokenizer: Any) -> None:
    conversation = talk("What is  this?", " A red cat. ", "Describe", "cat")
    for name in TEMPLATES:
        template = find_template(name)
        text = render(conversation, template, IMAGE_TOKEN, "</s>").text
        assert encode(conversation, tokenizer, template, (), IMAGE_TOKEN, 10_000)[0] == tokenizer(text)["input_ids"]


def test_a_records_own_system_turn_takes_the_templates_place() -> None:
    turns = (Turn("system", "Be short."), Turn("human", "What?"), Turn("assistant", "A"))
    text = render(Conversation("own", turns), find_template("internvl"), IMAGE_TOKEN, "</s>").text
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|><|im_start|>user\n")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_prompt_is_the_beginning_of_what_was_trained_up_to_the_answer(tokenizer: Any, name: str) -> None:
    conversation, template = talk("<image>\nWhat?", "A red cat", images=1), find_template(name)
    prompt = encode_prompt(conversation.question, tokenizer, template, (3,), IMAGE_TOKEN)
    ids, labels = encode(conversation, tokenizer, template, (3,), IMAGE_TOKEN, 1000)
    first = next(place for place, label in enumerate(labels) if label != IGNORED_LABEL)
    assert prompt == ids[:first]


def test_generation_stops_where_answers_were_trained_to_end(tokenizer: Any) -> None:
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert stop_ids(tokenizer, find_template("internvl")) == (end, eos)
    assert stop_ids(tokenizer, find_template("vicuna")) == (eos,)
    newline = tokenizer("\n")["input_ids"]
    assert stop_ids(tokenizer, find_template("plain")) == (*newline, eos)


def test_a_long_answer_loses_its_end_but_an_image_is_never_cut(tokenizer: Any) -> None:
    conversation = talk("<image>\nWhat?", "A red cat", images=1)
    whole, _ = encode(conversation, tokenizer, plain("internvl"), (5,), IMAGE_TOKEN, 1000)
    ids, labels = encode(conversation, tokenizer, plain("internvl"), (5,), IMAGE_TOKEN, len(whole) - 1)
    assert ids == whole[:-1]
    assert len(labels) == len(ids)
    with pytest.raises(DataError, match=r"record 7 has \d+ tokens, of which 5 are images'"):
        encode(conversation, tokenizer, plain("internvl"), (5,), IMAGE_TOKEN, 6)


def test_a_record_whose_answer_is_cut_off_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="record 7 has no answer within its first 4 tokens"):
        encode(talk("What is this?", "A"), tokenizer, plain("internvl"), (), IMAGE_TOKEN, 4)


def test_text_that_holds_the_image_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"2 times <IMG_CONTEXT> for 1 image\(s\)"):
        encode(talk("<image> <IMG_CONTEXT>", "A", images=1), tokenizer, plain("internvl"), (2,), IMAGE_TOKEN, 100)


def test_an_unknown_template_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="internvl, internvl2_5, vicuna"):
        find_template("chatml")


def test_a_tokenizer_is_given_the_special_tokens_that_it_lacks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"<unk>": 0, "what": 1}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>").save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path, find_template("internvl"), "<picture>")
    assert len(tokenizer) == 2 + 5
    assert tokenizer("<img><picture></img>what")["input_ids"] == [4, 6, 5, 1]
    assert tokenizer.pad_token == "<unk>"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path, find_template("plain"))
    with pytest.raises(ConfigError, match="is no folder"):
        load_tokenizer(tmp_path / "absent", find_template("plain"))


def test_equal_texts_give_an_equal_tiny_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a", TEXTS)
    tiny_tokenizer(tmp_path / "b", TEXTS)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="vocab_size 100 is too small"):
        tiny_tokenizer(tmp_path / "c", TEXTS, vocab_size=100)


@pytest.mark.parametrize(
    ("roles", "kind", "images", "message"),
    [
        (("assistant",), "instruction", 0, "human first"),
        (("human", "human"), "instruction", 0, "human and assistant in turn"),
        (("human",), "interleaved", 0, "one assistant turn"),
        ((), "instruction", 0, "the turns are none"),
        (("human",), "instruction", 2, r"0 place\(s\) for an image .* 2 image\(s\)"),
    ],
)
def test_turns_in_another_order_and_images_without_places_are_refused(
    roles: tuple[Any, ...], kind: Kind, images: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Conversation("odd", tuple(Turn(role, "text") for role in roles), (PICTURE,) * images, kind)
