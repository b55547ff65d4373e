"""Tokens of an answer as text, handed out only when it can no longer change.

A character may come in several tokens, and a text that begins like a stop string may become one:
both are held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "�"  # what a tokenizer writes for the first bytes of a character


class AnswerText:
    """The text of one answer as it grows; `stopped` once a stop string has come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._ids: list[int] = []
        self._before = 0  # tokens from here on are decoded: what came last, and what is new
        self._whole = 0  # tokens up to here are whole characters
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        return self._release(self._new(last=False), last=False)

    def end(self) -> str:
        """What was held back, when no token follows."""
        return "" if self.stopped else self._release(self._new(last=True), last=True)

    def _new(self, last: bool) -> str:
        known = self._decode(self._ids[self._before : self._whole])
        text = self._decode(self._ids[self._before :])
        if len(text) <= len(known) or (text.endswith(_BROKEN) and not last):
            return ""
        self._before, self._whole = self._whole, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str, last: bool) -> str:
        self._held += text
        found = [place for stop in self.stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self.stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
