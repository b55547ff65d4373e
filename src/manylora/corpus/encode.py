"""Conversations as token ids, with the loss on the assistant's turns alone.

    input_ids = [ prompt | answer, end of turn | prompt | answer, end of turn ]
    learned   =            ^^^^^^^^^^^^^^^^^^^            ^^^^^^^^^^^^^^^^^^^

The prompt is the conversation so far in the model's own chat template, with the opening of the
assistant's turn, tokenised on its own: training sees exactly the tokens that generation sees. The
answer is what the template writes after it, up to and including the end-of-turn token; what follows
the last answer (often a newline) is dropped. A tokenizer without a chat template gets each message
and a newline, and eos after an answer. Nothing is cut: an example that is too long is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from manylora.corpus.layouts import CorpusError, Example, Message

# Put in an answer's place to see what the template writes after it: a short answer such as "e"
# could be found inside the end-of-turn token itself.
_STAND_IN = "the-answer-stands-here"
_BATCH = 256

Numbers = npt.NDArray[np.int64]


class TooLongError(CorpusError):
    """An example has more tokens than the given length."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """learned: spans [start, stop) of input_ids that carry loss, one for each assistant turn."""

    task: str
    input_ids: list[int]
    learned: list[tuple[int, int]]
    source: str = ""

    @property
    def prompt_length(self) -> int:
        """Tokens before the last answer."""
        return self.learned[-1][0]

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss, ends of turns included."""
        return sum(stop - start for start, stop in self.learned)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of text that is tokenised on its own; end: the token put after a learned one."""

    text: str
    learned: bool = False
    end: int | None = None


class Encoder:
    """Turns examples into tokens for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """The tokens after which the model is to write its answer."""
        if self.tokenizer.chat_template is None:
            return self._with_bos(_plain(prompt))
        return self._ids([self._prompts([list(prompt)])[0]])[0]

    def encode(self, example: Example) -> Encoded:
        """One example as tokens; TooLongError when they are more than `max_length`."""
        (encoded,) = self.encode_many([example])
        if isinstance(encoded, TooLongError):
            raise encoded
        return encoded

    def encode_many(self, examples: Sequence[Example]) -> list[Encoded | TooLongError]:
        """As `encode`, many at once and faster; what is too long stands in its place as an error.

        Raises CorpusError for an example that the chat template cannot write.
        """
        pieces = self._pieces(examples)
        ids = iter(self._ids([piece.text for parts in pieces for piece in parts]))
        return [
            self._joined(example, parts, [next(ids) for _ in parts])
            for example, parts in zip(examples, pieces, strict=True)
        ]

    def split_too_long(self, examples: Iterable[Example]) -> tuple[list[Encoded], list[Example]]:
        """The encoded examples, and those that are too long: the caller reports how many."""
        encoded: list[Encoded] = []
        too_long: list[Example] = []
        rows = list(examples)
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for example, found in zip(batch, self.encode_many(batch), strict=True):
                if isinstance(found, TooLongError):
                    too_long.append(example)
                else:
                    encoded.append(found)
        return encoded, too_long

    def most_tokens(self, size: Numbers, messages: Numbers) -> Numbers:
        """An upper bound on the tokens of conversations with so many bytes and messages.

        A tokenizer makes at most one token of a byte; what the template adds is measured on
        stand-ins.
        """
        first, pair = self._frames
        return size + first + (messages + 1) // 2 * pair

    @cached_property
    def _frames(self) -> tuple[int, int]:
        """Bytes that the template adds to one question, and to a further answer and question."""
        conversation: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "x"},
        ]
        if self.tokenizer.chat_template is None:
            return 2, 2  # bos, newline, eos
        one, two = self._prompts([conversation[:1], conversation])
        return len(one.encode()), len(two.encode()) - len(one.encode())

    def _joined(
        self, example: Example, parts: list[_Piece], ids: list[list[int]]
    ) -> Encoded | TooLongError:
        tokens: list[int] = []
        learned = []
        for number, (piece, own) in enumerate(zip(parts, ids, strict=True)):
            if number == 0 and self.tokenizer.chat_template is None:
                own = self._bos(own)
            start = len(tokens)
            tokens += own
            if piece.learned:
                tokens += [] if piece.end is None else [piece.end]
                learned.append((start, len(tokens)))
        if len(tokens) > self.max_length:
            return TooLongError(
                f"{example.source}: {len(tokens)} tokens ({learned[-1][0]} of them before the last "
                f"answer), more than max_length={self.max_length}. Raise max_length or shorten the "
                "row."
            )
        return Encoded(example.task, tokens, learned, example.source)

    def _pieces(self, examples: Sequence[Example]) -> list[list[_Piece]]:
        if self.tokenizer.chat_template is None:
            return [self._plain_pieces(example) for example in examples]
        wholes = self._rendered([example.messages for example in examples])
        turns = [
            [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
            for example in examples
        ]
        prompts = iter(
            self._prompts(
                [
                    example.messages[:turn]
                    for example, own in zip(examples, turns, strict=True)
                    for turn in own
                ]
            )
        )
        return [
            self._cut(example, whole, [(turn, next(prompts)) for turn in own])
            for example, whole, own in zip(examples, wholes, turns, strict=True)
        ]

    def _cut(self, example: Example, whole: str, turns: Sequence[tuple[int, str]]) -> list[_Piece]:
        """The rendered conversation in pieces: prompt, answer, prompt, answer, ..."""
        pieces = []
        done = 0
        for turn, before in turns:
            content = example.messages[turn]["content"].strip()
            found = None
            if whole.startswith(before) and len(before) >= done:
                find = self._last_answer if turn == turns[-1][0] else self._earlier_answer
                found = find(whole, len(before), content)
            # Some templates strip the answer that they are given, so its own spaces do not count.
            if found is None or not found[0].text.endswith(content):
                raise self._unusable(example, whole, before)
            pieces += [_Piece(whole[done : len(before)]), found[0]]
            done = found[1]
        return pieces

    def _last_answer(self, whole: str, start: int, content: str) -> tuple[_Piece, int] | None:
        if not whole.endswith(self._closing):
            return None
        answer = whole[start:].removesuffix(self._closing).rstrip()
        return _Piece(answer, True, self._end[0]), len(whole)

    def _earlier_answer(self, whole: str, start: int, content: str) -> tuple[_Piece, int] | None:
        """The answer from `start` on, and where the text goes on after its end of turn."""
        end, written = self._end
        if not written:  # no end-of-turn token stands in the conversation, so none is learned
            found = whole.startswith(content, start)
            return (_Piece(content, True), start + len(content)) if found else None
        stop = whole.find(written, start)
        if stop < 0:
            return None
        return _Piece(whole[start:stop].rstrip(), True, end), stop + len(written)

    @cached_property
    def _closing(self) -> str:
        """What the template writes after the last answer."""
        conversation: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _STAND_IN},
        ]
        return self._rendered([conversation])[0].rpartition(_STAND_IN)[2]

    @cached_property
    def _end(self) -> tuple[int, str]:
        """The first special token after an answer and its text; eos, unwritten, if it has none."""
        for token in self._ids([self._closing])[0]:
            added = self.tokenizer.added_tokens_decoder.get(token)
            if token == self.tokenizer.eos_token_id or (added is not None and added.special):
                return token, str(self.tokenizer.convert_ids_to_tokens(token))
        return self._eos(), ""

    def _eos(self) -> int:
        token = self.tokenizer.eos_token_id
        if not isinstance(token, int):
            raise CorpusError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token, so "
                "the model could not learn to stop. Set tokenizer.eos_token."
            )
        return token

    def _unusable(self, example: Example, whole: str, before: str) -> CorpusError:
        return CorpusError(
            f"{example.source}: the chat template of "
            f"{self.tokenizer.name_or_path or 'the tokenizer'} writes the conversation as "
            f"{whole[-120:]!r}, which does not continue the prompt {before[-60:]!r} with the "
            "answer. Set tokenizer.chat_template to a template that does, or to None for plain "
            "text."
        )

    def _prompts(self, conversations: list[list[Message]]) -> list[str]:
        return self._rendered(conversations, add_generation_prompt=True)

    def _rendered(
        self, conversations: list[list[Message]], add_generation_prompt: bool = False
    ) -> list[str]:
        plain: list[Any] = conversations
        texts = self.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return [str(text) for text in texts]

    def _plain_pieces(self, example: Example) -> list[_Piece]:
        pieces = []
        before: list[Message] = []
        for message in example.messages:
            if message["role"] == "assistant":
                pieces += [_Piece(_plain(before)), _Piece(message["content"], True, self._eos())]
                before = []
            else:
                before.append(message)
        return pieces

    def _with_bos(self, text: str) -> list[int]:
        return self._bos(self._ids([text])[0])

    def _bos(self, ids: list[int]) -> list[int]:
        """With the first token that the tokenizer itself would put before plain text.

        Its other special tokens stay out: an end token after the prompt would end the answer too.
        """
        bos = self._own_bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    @cached_property
    def _own_bos(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])


def _plain(messages: Sequence[Message]) -> str:
    return "".join(f"{message['content']}\n" for message in messages)
