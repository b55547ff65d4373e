"""What a request may say, as OpenAI names it; anything else is refused, never ignored silently.

Fields that this server cannot honour are accepted at the value that changes nothing; `user`,
`metadata` and `store` say nothing about the answer and are accepted as they are. `ignore_eos`, for
measurements, is vLLM's: an answer goes on to its limit.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manylora.corpus import Message
from manylora.serve.limits import ApiError

StopString = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """include_usage: a last chunk with the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Common(_Strict):
    model: str
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | list[StopString] | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    # At the value that changes nothing:
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Of no consequence for the answer:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _few_stops(self) -> _Common:
        if len(self.stops) > 16:
            raise ValueError(f"stop has {len(self.stops)} strings; at most 16")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class TextPart(_Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: None = None

    def as_message(self) -> Message:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        # OpenAI's newer name for the same turn, which chat templates do not know.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    default_limit: ClassVar[int | None] = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextFormat(_Strict):
    """The only format of an answer."""

    type: Literal["text"]


class CompletionRequest(_Common):
    """POST /v1/completions; prompt: a text or token ids."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    default_limit: ClassVar[int | None] = 16  # OpenAI's

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def text_or_ids(self) -> str | list[int]:
        if isinstance(self.prompt, list) and isinstance(self.prompt[0], str):
            return self.prompt[0]
        return self.prompt

    @property
    def reported(self) -> int | None:
        return self.logprobs


Request = ChatRequest | CompletionRequest


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a JSON body; ApiError 400 that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        what = (
            "not supported by this server" if first["type"] == "extra_forbidden" else first["msg"]
        )
        message = f"{param}: {what}" if param else what
        raise ApiError(400, message[:500], param=param and param[:100]) from None
