"""An Ollama Modelfile: FROM, ADAPTER, and TEMPLATE where the chat template is a known one.

Ollama's templates are Go, a tokenizer's are Jinja. A known format is recognised by what it writes:
the tokenizer's template, given a conversation, must give exactly that text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"

_TALK = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")]


@dataclass(frozen=True)
class ChatFormat:
    """A way to write a conversation: as a function, and as Ollama's template.

    answer: what comes before the model's reply. stop: what ends it.
    """

    name: str
    turn: Callable[[str, str], str]
    answer: str
    template: str
    stop: tuple[str, ...]

    def written(self, turns: list[tuple[str, str]]) -> str:
        return "".join(self.turn(role, text) for role, text in turns) + self.answer


def _chatml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _llama3(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def _zephyr(role: str, text: str) -> str:
    return f"<|{role}|>\n{text}</s>\n"


def _go(before: str, between: str, after: str, answer: str) -> str:
    """Ollama's loop over the messages, each written as before ROLE between TEXT after."""
    return (
        "{{- range .Messages }}"
        + before
        + "{{ .Role }}"
        + between
        + "{{ .Content }}"
        + after
        + "{{ end }}"
        + answer
    )


FORMATS = (
    ChatFormat(
        "ChatML",
        _chatml,
        "<|im_start|>assistant\n",
        _go("<|im_start|>", "\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        ("<|im_start|>", "<|im_end|>"),
    ),
    ChatFormat(
        "Llama 3",
        _llama3,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        _go(
            "<|start_header_id|>",
            "<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|start_header_id|>", "<|eot_id|>"),
    ),
    ChatFormat(
        "Zephyr",
        _zephyr,
        "<|assistant|>\n",
        _go("<|", "|>\n", "</s>\n", "<|assistant|>\n"),
        ("<|user|>", "</s>"),
    ),
)


def modelfile(
    model: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The Modelfile's text, and a word on its template.

    model, adapter: file names beside the Modelfile; with an adapter, `model` is for the user to
    replace by a GGUF of the base.
    """
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.insert(0, f"# {model} is a GGUF of the base model that this adapter was trained on")
        lines.append(f"ADAPTER ./{adapter}")
    found = known_format(tokenizer)
    if found is None:
        lines.append("# The chat template is none that Ollama's language has here: write TEMPLATE")
        about = "the Modelfile has no TEMPLATE, because the chat template is not a known one"
        return "\n".join([*lines, ""]), about
    lines.append(f'TEMPLATE """{found.template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in found.stop]
    system = default_system(tokenizer, found)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join([*lines, ""]), f"the Modelfile has the {found.name} template"


def known_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format that writes a conversation exactly as the tokenizer's template; None: unknown."""
    said = _rendered(tokenizer, _TALK)
    return next((known for known in FORMATS if known.written(_TALK) in said), None)


def default_system(tokenizer: PreTrainedTokenizerBase, known: ChatFormat) -> str:
    """What the template says as system where a conversation has none; empty: nothing."""
    start, _, end = known.turn("system", "\x00").partition("\x00")
    alone = known.written([("user", "One?")])
    for said in _rendered(tokenizer, [("user", "One?")]):
        if said.startswith(start) and said.endswith(end + alone):
            return said.removeprefix(start).removesuffix(end + alone)
    return ""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> list[str]:
    """What the template writes, and that without the token that begins every text."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):  # it has no system role, or wants other turns
        return []
    return [str(said), str(said).removeprefix(str(tokenizer.bos_token or ""))]
