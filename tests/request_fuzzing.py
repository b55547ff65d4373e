"""Damaged requests to a server, the same for the same seed, and what each must lead to.

Whatever is sent: an answer, or an error in OpenAI's shape that is the sender's own (4xx), within
`SECONDS`; where it is not HTTP any more, 400 or a closed connection.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from http.client import HTTPException, HTTPResponse
from typing import Any

from fuzz_check import ViolationError

KINDS = ("chat", "completions", "http")
SECONDS = 40.0  # a body may take 30 to arrive, and then gets 408
PATIENCE = 0.5  # until a sender of broken HTTP has said all: its length may promise more

ODD: list[Any] = [
    *(None, True, -1, 0, 10**40, 1e308, float("nan"), float("-inf"), "", "\ud800", "x" * 3000),
    *([], {}, [[]], [None], {"a": 1}, "1", [10**30]),
]
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "é"}]},
    ],
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 1,
    "stop": ["a"],
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "user": "u",
}
COMPLETION: dict[str, Any] = {
    "model": "m",
    "prompt": [1, 2],
    "max_tokens": 5,
    "logprobs": 1,
    "seed": 3,
    "stream": True,
}
_BODIES = {"chat": CHAT, "completions": COMPLETION}
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "POST", "p\u00f6st", "")
_TARGETS = (
    *("/v1/models", "/v1/models/hydra", "/v1/models/../../etc/passwd", "/v1/models/%00", "/health"),
    *("/metrics", "/", "//", "*", "/v1/chat/completions?x=1", "/v1/embeddings", "/" + "a" * 20_000),
    *("http://example.org/v1/models", "/%ff%fe", "/v1/completions#x", ""),
)
_HEADERS = (
    *("Content-Type: text/plain", "Content-Type:", "Content-Type: application/json; charset=x"),
    *("Host: example.org", "Host: [::", "Host: localhost:99999", "Host: 127.0.0.1\x00"),
    *("Content-Length: -1", "Content-Length: 1e3", "Content-Length: 7", "Content-Length: 9999999"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Content-Encoding: gzip"),
    *("Expect: 100-continue", "Upgrade: websocket", "Connection: Upgrade"),
    *("Authorization: Basic x", "Authorization: Bearer \x7f", "X: " + "y" * 70_000, "no colon"),
    *(" folded: x", "Range: bytes=0-"),
)


def mutated(rng: random.Random, value: dict[str, Any]) -> bytes:
    """A request's body with odd values put in, or bytes damaged."""
    changed = deepcopy(value)
    for _ in range(rng.randint(0, 2)):
        place: Any = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.6:
                place = place[key]
                continue
            place[key] = deepcopy(rng.choice(ODD))
            break
    body = bytearray(json.dumps(changed).encode())
    for _ in range(rng.choice([0, 0, 1, 3])):
        start = rng.randrange(len(body))
        body[start : start + rng.randint(0, 5)] = rng.randbytes(rng.randint(0, 5))
    return bytes(body)


def make_request(kind: str, number: int, seed: int, models: Sequence[str]) -> bytes:
    """All bytes of a request of that number."""
    rng = random.Random(f"request:{kind}:{seed}:{number}")
    of = kind if kind in _BODIES else rng.choice(list(_BODIES))
    value = {**_BODIES[of], "model": rng.choice(models)}
    if of == "chat":
        value["stream"] = rng.random() < 0.5
    if not is_damaged(number):
        return _http(json.dumps(value).encode(), _PATHS[of])
    if kind != "http":
        return _http(mutated(rng, value), _PATHS[of])
    return _broken(rng, json.dumps(value).encode(), _PATHS[of])


def is_damaged(number: int) -> bool:
    """Every 50th is not."""
    return number % 50 != 0


def _http(
    body: bytes, target: str, method: str = "POST", more: Sequence[str] = (), end: str = "\r\n"
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *more, "", ""]
    return end.join(lines).encode("latin-1") + body


def _broken(rng: random.Random, body: bytes, path: str) -> bytes:
    """Other methods, targets and headers, chunks, damaged or missing bytes."""
    method = rng.choice(_METHODS) if rng.random() < 0.3 else "POST"
    target = rng.choice(_TARGETS) if rng.random() < 0.3 else path
    more = rng.sample(_HEADERS, rng.choice((0, 0, 1, 1, 2)))
    if rng.random() < 0.05:
        body = body.replace(b"be kind", b"k" * rng.choice((19_000, 300_000)))
    raw = bytearray(_http(body, target, method, more, rng.choice(("\r\n", "\r\n", "\r\n", "\n"))))
    for _ in range(rng.choice((0, 0, 1, 4))):
        start = rng.randrange(len(raw))
        raw[start : start + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    cut = rng.random() < 0.15
    return bytes(raw[: rng.randrange(1, len(raw))] if cut else raw)


def check(port: int, raw: bytes, kind: str, seconds: float = SECONDS) -> str:
    """Send it; the status of what comes back, or "closed".

    Raises ViolationError for an answer that is none or the server's own fault; TimeoutError where
    none comes.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with suppress(OSError):  # refused before all was sent; what it said is there to be read
            connection.sendall(raw)
        if kind == "http":
            connection.settimeout(PATIENCE)
            try:
                connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                return "closed"
            connection.settimeout(seconds)
        try:
            response = HTTPResponse(connection, method=raw[:4].decode("latin-1").strip())
            response.begin()
            content = response.read()
        except TimeoutError:
            raise
        except (HTTPException, OSError) as error:
            if kind == "http":
                return "closed"
            raise ViolationError(f"no whole answer: {error!r}") from None
    _judge(response, content, kind)
    return str(response.status)


def _judge(response: HTTPResponse, content: bytes, kind: str) -> None:
    status, of = response.status, response.headers.get_content_type()
    if status >= 500:
        raise ViolationError(f"status {status}: {content[:200]!r}")
    try:
        if of == "text/event-stream":
            events = content.decode().removesuffix("\n\n").split("\n\n")
            assert events.pop() == "data: [DONE]"
            for event in events:
                assert "choices" in json.loads(event.removeprefix("data: "))
        elif status == 200 and of == "application/json" and content:
            assert {"choices", "data", "status", "id"} & json.loads(content).keys()
        elif status >= 400 and of == "application/json" and content:
            assert json.loads(content)["error"].keys() == {"message", "type", "param", "code"}
        else:
            assert kind == "http"  # its own words for what is no HTTP; metrics; HEAD
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ViolationError(f"status {status}, {of}: {content[:200]!r} {error!r}") from None
