"""How conversations become text: the published templates, each as the pieces that stand around what is said.

Sources: `internvl_chat/internvl/conversation.py` of OpenGVLab/InternVL (internlm2-chat and Hermes-2, one text;
phi3-chat; internvl2_5), `llava/conversation.py` of haotian-liu/LLaVA (v1, which MobileVLM uses too; plain), the model
card of Phi-2 and the image markers of TinyGPT-V. tests/golden/test_vlm_chat_parity.py holds whole texts of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.errors import ConfigError

EOS = "{eos}"
"""In a template: the tokenizer's own end-of-sequence token, which is `</s>` for the models it was published with."""

IMAGE_TOKEN = "<IMG_CONTEXT>"
"""Stands in the ids for one image embedding: InternVL's token, used here with every template."""

# The published system messages, word for word: the chat models were trained with them.
_INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "  # noqa: RUF001
    "是一个有用无害的人工智能助手。"
)
_INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """The pieces around the turns of a conversation.

    Attributes:
        system_start: before the system message.
        system_message: unless the conversation brings its own; empty leaves the system part out.
        system_end: after it.
        human_start: before what the human says.
        human_end: after it.
        assistant_start: before an answer; a prompt for generation ends with it.
        answer_start: the answer's own beginning, learned with it: templates that end in a colon have a space here.
        assistant_end: ends an answer and is learned; generation stops at it.
        after_answer: stands between an answer and the next turn, not learned.
        image_start: before an image's tokens.
        image_end: after them.
        strips: turns are stripped of white space around them, as InternVL's and LLaVA's readers do.
        special_tokens: texts above that must be one token each.
    """

    system_start: str = ""
    system_message: str = ""
    system_end: str = ""
    human_start: str = ""
    human_end: str = ""
    assistant_start: str = ""
    answer_start: str = ""
    assistant_end: str = ""
    after_answer: str = ""
    image_start: str = ""
    image_end: str = ""
    strips: bool = True
    special_tokens: tuple[str, ...] = ()


_INTERNVL = Template(
    system_start="<|im_start|>system\n",
    system_message=_INTERNVL_SYSTEM,
    system_end="<|im_end|>",
    human_start="<|im_start|>user\n",
    human_end="<|im_end|>",
    assistant_start="<|im_start|>assistant\n",
    assistant_end="<|im_end|>",
    image_start="<img>",
    image_end="</img>",
    special_tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
)
_INTERNVL2_5 = Template(
    system_start="<|im_start|>system\n",
    system_message=_INTERNVL2_5_SYSTEM,
    system_end="<|im_end|>\n",
    human_start="<|im_start|>user\n",
    human_end="<|im_end|>\n",
    assistant_start="<|im_start|>assistant\n",
    assistant_end="<|im_end|>",
    after_answer="\n",
    image_start="<img>",
    image_end="</img>",
    special_tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
)
_PHI3 = Template(
    system_start="<|system|>\n",
    system_message=_INTERNVL_SYSTEM,
    system_end="<|end|>",
    human_start="<|user|>\n",
    human_end="<|end|>",
    assistant_start="<|assistant|>\n",
    assistant_end="<|end|>",
    image_start="<img>",
    image_end="</img>",
    special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>"),
)
_VICUNA = Template(
    system_message=_VICUNA_SYSTEM,
    system_end=" ",
    human_start="USER: ",
    human_end=" ",
    assistant_start="ASSISTANT:",
    answer_start=" ",
    assistant_end=EOS,
)
_PHI2 = Template(
    human_start="Instruct: ",
    human_end="\n",
    assistant_start="Output:",
    answer_start=" ",
    assistant_end=EOS,
    image_start="<Img>",
    image_end="</Img>",
)
_PLAIN = Template(assistant_end="\n", strips=False)

DOCUMENT = Template(assistant_end=EOS, strips=False)
"""Interleaved documents and texts, whatever the conversations' template: learned whole, up to the end of sequence."""

TEMPLATES: dict[str, Template] = {
    "internvl": _INTERNVL,
    "internvl2_5": _INTERNVL2_5,
    "vicuna": _VICUNA,
    "llava": _VICUNA,
    "phi": _PHI3,
    "phi3": _PHI3,
    "phi2": _PHI2,
    "plain": _PLAIN,
}


def find_template(name: str) -> Template:
    """Return the template of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"Unknown template {name!r}; choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]
