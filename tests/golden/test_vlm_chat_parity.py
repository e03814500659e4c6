"""Whole texts of the published templates, written out as their repositories' code builds them.

The expectations are literal: system message, roles and separators as registered in InternVL's and LLaVA's
conversation.py, joined by hand in the way of their separator styles (MPT: system, sep, then role, message, sep for each
turn; TWO: "role: message" and the two separators in turn; PLAIN: message and separator).
"""

from __future__ import annotations

import pytest

from distill.vlm.chat import render
from distill.vlm.conversation import Conversation, Turn
from distill.vlm.templates import IMAGE_TOKEN, find_template

INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PUBLISHED = {
    # internlm2-chat and Hermes-2 of InternVL: MPT, sep "<|im_end|>".
    "internvl": f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>"
    "<|im_start|>user\nHello!<|im_end|><|im_start|>assistant\nHi!<|im_end|>"
    "<|im_start|>user\nHow are you?<|im_end|><|im_start|>assistant\nFine.<|im_end|>",
    # internvl2_5: MPT, sep "<|im_end|>\n".
    "internvl2_5": f"<|im_start|>system\n{INTERNVL2_5_SYSTEM}<|im_end|>\n"
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
    "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n",
    # phi3-chat: MPT, sep "<|end|>".
    "phi3": f"<|system|>\n{INTERNVL_SYSTEM}<|end|>"
    "<|user|>\nHello!<|end|><|assistant|>\nHi!<|end|><|user|>\nHow are you?<|end|><|assistant|>\nFine.<|end|>",
    # vicuna_v1 of LLaVA, "v1" of MobileVLM: TWO, sep " ", sep2 "</s>".
    "vicuna": f"{VICUNA_SYSTEM} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT: Fine.</s>",
    # Phi-2's card: "Instruct: <prompt>\nOutput:", and its end of text.
    "phi2": "Instruct: Hello!\nOutput: Hi!</s>Instruct: How are you?\nOutput: Fine.</s>",
    # plain of LLaVA: PLAIN, sep "\n" after the caption.
    "plain": "Hello!Hi!\nHow are you?Fine.\n",
}

TURNS = (
    Turn("human", "Hello!"),
    Turn("assistant", "Hi!"),
    Turn("human", "How are you?"),
    Turn("assistant", "Fine."),
)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_conversation_is_written_as_published(name: str) -> None:
    assert render(Conversation("hello", TURNS), find_template(name), IMAGE_TOKEN, "</s>").text == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("internvl", "<|im_start|>assistant\n"),
        ("internvl2_5", "<|im_start|>assistant\n"),
        ("phi3", "<|assistant|>\n"),
        ("vicuna", "ASSISTANT:"),
        ("phi2", "Output:"),
        ("plain", ""),
    ],
)
def test_a_prompt_ends_as_published_get_prompt_does_with_an_empty_message(name: str, end: str) -> None:
    asked = render(Conversation("hello", TURNS[:3]), find_template(name), IMAGE_TOKEN, "</s>", is_prompt=True).text
    answered = PUBLISHED[name]
    assert asked == answered[: answered.rindex("Fine.")].rstrip(" ")
    assert asked.endswith(end)


def test_the_other_names_are_the_same_templates() -> None:
    assert find_template("llava") == find_template("vicuna")
    assert find_template("phi") == find_template("phi3")


def test_internvl2_5_is_chatml_as_transformers_writes_it() -> None:
    from jinja2 import Environment

    # The `chat_template` of Qwen2's tokenizer_config.json.
    qwen2 = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    roles = {"system": "system", "human": "user", "assistant": "assistant"}
    turns = (Turn("system", "You are a helpful assistant."), *TURNS)
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    expected = Environment(autoescape=False).from_string(qwen2).render(messages=messages)
    assert render(Conversation("hello", turns), find_template("internvl2_5"), IMAGE_TOKEN, "").text == expected
