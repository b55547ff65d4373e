"""What a row may look like, and which column of it is what.

A row becomes a conversation, a list of `Message`. These layouts are known by their column names,
upper and lower case taken as one:

    messages       messages | conversations | conversation | dialog | dialogue | chat
    one exchange   a prompt  instruction | prompt | query | question | problem, or else `input`
                   an answer output | response | answer | completion | target | solution
                   perhaps   input | context (follows the prompt on a new line), system, history

A column that `Fields` names is taken as named. Where `Fields` names the prompt or the messages,
only the columns that it names, and the answer, are read. Two columns that could be the same thing
are an error that shows how to say which one is meant; nothing is guessed. Tests of code, which are
kept and not learned, have columns of their own (code_tests.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator

from manylora.corpus.code_tests import columns_of_tests

MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
PROMPTS = ("instruction", "prompt", "query", "question", "problem")
INPUTS = ("input", "context")
OUTPUTS = ("output", "response", "answer", "completion", "target", "solution")
SYSTEMS = ("system", "system_prompt")
HISTORIES = ("history",)
_KNOWN = frozenset((*MESSAGES, *PROMPTS, *INPUTS, *OUTPUTS, *SYSTEMS, *HISTORIES))
CHOICES = re.compile(r"(choice|option|ending)s?[ _]?\w?", re.IGNORECASE)


class CorpusError(ValueError):
    """The data cannot be used as they are; the message says where, why and what to do."""


class RowError(ValueError):
    """Why a row cannot be used, without the place where it stands."""


class Message(TypedDict):
    """One turn; the role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation; its last message is the assistant's, unless it is to be answered."""

    task: str
    messages: list[Message]
    source: str
    """Where the row stands, as "file.jsonl:17"."""
    tests: str = ""
    """Python that asserts something of the answer, which is code; never learned from."""

    @property
    def answered(self) -> bool:
        return self.messages[-1]["role"] == "assistant"

    @property
    def prompt(self) -> list[Message]:
        """What the last answer answers: all messages, where there is no answer yet."""
        return self.messages[:-1] if self.answered else self.messages

    @property
    def output(self) -> str:
        """The last answer; empty where there is none yet."""
        return self.messages[-1]["content"] if self.answered else ""


class Fields(BaseModel):
    """Which columns hold what, where their names do not say it (the recipe's `fields`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = Field(None, min_length=1)
    input: str | None = Field(None, min_length=1)
    output: str | None = Field(None, min_length=1)
    system: str | None = Field(None, min_length=1)
    messages: str | None = Field(None, min_length=1)
    task: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_layout(self) -> Fields:
        if self.messages and (self.prompt or self.input or self.output):
            raise ValueError(
                "messages is a whole conversation: give it without prompt, input and output"
            )
        twice = [name for name in self.named if self.named.count(name) > 1]
        if twice:
            raise ValueError(f"the column {twice[0]!r} is named twice")
        return self

    @property
    def named(self) -> list[str]:
        """The columns that are named."""
        return [name for name in self.model_dump().values() if name is not None]


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that are read: messages, or prompt and output with what belongs to them.

    tests: those that hold tests of the answer.
    """

    messages: str | None = None
    prompt: str | None = None
    output: str | None = None
    task: str | None = None
    input: str | None = None
    system: str | None = None
    history: str | None = None
    tests: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        every = (*self.needed, *self.optional, *self.tests)
        return [column for column in every if column is not None]

    def __str__(self) -> str:
        parts = (self.messages, self.prompt, self.input, self.output)
        return "/".join(part[:40] for part in parts if part is not None)

    def joined(self, other: Layout) -> Layout | None:
        """Both, where they differ only in optional columns that one of them is without."""
        if self.needed != other.needed:
            return None
        optional = []
        for mine, theirs in zip(self.optional, other.optional, strict=True):
            if mine and theirs and mine != theirs:
                return None
            optional.append(mine or theirs)
        given, system, history = optional
        return replace(self, input=given, system=system, history=history)

    @property
    def needed(self) -> tuple[str | None, ...]:
        return self.messages, self.prompt, self.output, self.task

    @property
    def optional(self) -> tuple[str | None, ...]:
        return self.input, self.system, self.history


def find_layout(columns: Sequence[str], fields: Fields, answered: bool = True) -> Layout:
    """What each column is; RowError when that is not clear. `answered`: an answer is needed."""
    layout = _find(columns, fields, answered)
    taken = (*layout.columns, *fields.named)
    return replace(layout, tests=columns_of_tests(columns, taken))


def _find(columns: Sequence[str], fields: Fields, answered: bool) -> Layout:
    _check_named(columns, fields, answered)
    named = fields.named
    free = [column for column in _among(columns, _KNOWN) if column not in named]
    chat = fields.messages
    if not (chat or fields.prompt or fields.output):
        chat = _one(_among(free, MESSAGES), "messages")
        if chat and _among(free, (*PROMPTS, "input")) and _among(free, OUTPUTS):
            prompt, output = _among(free, (*PROMPTS, "input"))[0], _among(free, OUTPUTS)[0]
            raise RowError(
                f"both a conversation ({chat!r}) and an exchange ({prompt!r}, {output!r}). Say "
                f"which is meant in the recipe: `fields: {{messages: {chat}}}` or "
                f"`fields: {{prompt: {prompt}, output: {output}}}`."
            )
    # What is named is all there is: a column left out on purpose must not come back.
    more = [] if fields.prompt or fields.messages else free
    system = fields.system or _one(_among(more, SYSTEMS), "system")
    system = system if system in columns else None
    if chat:
        return Layout(messages=chat, system=system, task=fields.task)
    return _exchange(columns, fields, answered, free, system)


def _exchange(
    columns: Sequence[str], fields: Fields, answered: bool, free: list[str], system: str | None
) -> Layout:
    prompt = fields.prompt or _one(_among(free, PROMPTS), "prompt")
    prompt = prompt or _one(_among(free, INPUTS[:1]), "prompt")
    more = [] if fields.prompt else [column for column in free if column != prompt]
    given = fields.input or _one(_among(more, INPUTS), "input")
    taken = {prompt, given, system}
    output = None
    if answered:
        outputs = _among([column for column in free if column not in taken], OUTPUTS)
        output = fields.output or _one(outputs, "output")
    if prompt is None or (answered and output is None):
        raise RowError(_missing(columns, prompt, output, answered))
    if answered and not fields.prompt:
        _check_choices(columns, prompt, str(output))
    return Layout(
        prompt=prompt,
        input=given if given in columns else None,
        output=output,
        system=system,
        history=_one(_among(more, HISTORIES), "history"),
        task=fields.task,
    )


def check_optional(columns: Collection[str], fields: Fields) -> None:
    """Optional columns may be absent from a row, but what is named must be in some row."""
    for key, name in (("input", fields.input), ("system", fields.system)):
        if name is not None and name not in columns:
            raise RowError(
                f"`fields.{key}` names {name!r}, which no row has; there are {listed(columns)}. "
                "Give the column's name as it is written there."
            )


def listed(columns: Collection[str]) -> str:
    """Column names for a message; a row of a thousand columns is not shown whole."""
    shown = [repr(column[:40]) for column in list(columns)[:12]]
    more = len(columns) - len(shown)
    return (", ".join(shown) or "no field") + (f" and {more} more" if more else "")


def _check_named(columns: Sequence[str], fields: Fields, answered: bool) -> None:
    required = [("messages", fields.messages), ("prompt", fields.prompt), ("task", fields.task)]
    if answered:
        required.append(("output", fields.output))
    for key, name in required:
        if name is not None and name not in columns:
            raise RowError(
                f'no field "{name[:40]}", which `fields.{key}` names; the row has '
                f"{listed(columns)}."
            )


def _check_choices(columns: Sequence[str], prompt: str, output: str) -> None:
    """Multiple choice without its choices would be learned as a guess."""
    choices = [column for column in columns if CHOICES.fullmatch(column.strip())]
    choices += [column for column in columns if column in ("A", "B", "C", "D")]
    if choices:
        raise RowError(
            f"{listed(choices)} look like the choices of a question, and {prompt!r} alone would be "
            f"learned. Write the choices into {prompt!r}, or say that they are to be left out: "
            f"`fields: {{prompt: {prompt}, output: {output}}}`."
        )


def _missing(columns: Sequence[str], prompt: str | None, output: str | None, answered: bool) -> str:
    wanted = []
    if prompt is None:
        wanted.append(f"the prompt ({', '.join(PROMPTS)})")
    if answered and output is None:
        wanted.append(f"the answer ({', '.join(OUTPUTS)})")
    hint = f"prompt: {prompt or 'COLUMN'}" + (f", output: {output or 'COLUMN'}" if answered else "")
    return (
        f"no field for {' and none for '.join(wanted)}, nor a conversation "
        f"({', '.join(MESSAGES[:3])}); the row has {listed(columns)}. Name the columns in the "
        f"recipe: `fields: {{{hint}}}`."
    )


def _among(columns: Sequence[str], names: Collection[str]) -> list[str]:
    return [column for column in columns if column.strip().casefold() in names]


def _one(columns: list[str], key: str) -> str | None:
    if len(columns) > 1:
        raise RowError(
            f"{listed(columns)} could each be the {key}. Say which is meant in the recipe: "
            f"`fields: {{{key}: {columns[0][:40]}}}`."
        )
    return columns[0] if columns else None
