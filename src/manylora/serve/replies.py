"""Answers in OpenAI's shapes: whole, and as the events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from manylora.serve.engine import Piece
from manylora.serve.sampling import Likelihood

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class Reply:
    """Builds what one request gets, from the engine's pieces.

    branch: the task whose branch answers, reported as `manylora_branch`.
    """

    def __init__(
        self,
        model: str,
        branch: str | None,
        prompt_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
    ) -> None:
        self.chat, self.prompt_tokens, self.tokenizer = chat, prompt_tokens, tokenizer
        self._kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "manylora_branch": branch,
        }
        self._offset = 0

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The response without streaming."""
        text = "".join(piece.text for piece in pieces)
        reports = [piece.likelihood for piece in pieces if piece.likelihood is not None]
        choice: dict[str, Any] = {"index": 0, "finish_reason": pieces[-1].finish}
        choice["logprobs"] = self._logprobs(reports) if reports else None
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        usage = self.usage(pieces[-1])
        return {**self._head, "object": self._kind, "choices": [choice], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        first = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": first, "finish_reason": None}])] * self.chat

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish}
        report = piece.likelihood
        choice["logprobs"] = None if report is None else self._logprobs([report])
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text or report else {}
        else:
            choice["text"] = piece.text
        return self._chunk([choice])

    def closing(self, last: Piece) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._chunk([]) | {"usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": last.tokens,
            "total_tokens": self.prompt_tokens + last.tokens,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._kind + ".chunk" if self.chat else self._kind
        return {**self._head, "object": kind, "choices": choices}

    def _logprobs(self, reports: Sequence[Likelihood]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._chat_entry(r) for r in reports], "refusal": None}
        texts = [self._text(report.token) for report in reports]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [report.logprob for report in reports],
            "top_logprobs": [{self._text(t): value for t, value in r.top} for r in reports],
            "text_offset": offsets,
        }

    def _chat_entry(self, report: Likelihood) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in report.top]
        return {**self._token(report.token, report.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # Part of a character has no text of its own, and then no bytes that could be told here.
        known = None if "�" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))
