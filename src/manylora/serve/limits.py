"""What a server accepts: who may ask, and how much."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass

KEY_VARIABLE = "MANYLORA_API_KEY"


@dataclass(frozen=True)
class Limits:
    """rows: decoded at once. queue: requests that may wait beyond those. body: bytes.

    max_tokens: of an answer. prompt_tokens: of a prompt; None: what the model's context leaves.
    body_seconds: for a request to arrive.
    """

    rows: int = 64
    queue: int = 256
    body: int = 1 << 20
    max_tokens: int = 4096
    prompt_tokens: int | None = None
    body_seconds: float = 30.0


class ApiError(Exception):
    """An error that is answered in OpenAI's shape, with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, key: str | None, allow_anyone: bool) -> None:
    """ValueError where other machines could ask without a key."""
    if key == "":
        raise ValueError(f"{KEY_VARIABLE} is set and empty: give it a key, or unset it")
    if key is None and not allow_anyone and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets other machines ask this server, and there is no key: set "
            f"{KEY_VARIABLE} to one, or say --allow-anyone"
        )


def check_key(authorization: str | None, key: str | None) -> None:
    """ApiError 401 unless the Authorization header carries the key (where there is one)."""
    if key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    fits = hmac.compare_digest(given.strip().encode(), key.encode())
    if scheme.lower() != "bearer" or not fits:
        raise ApiError(
            401,
            "this server needs its API key, as `Authorization: Bearer KEY`",
            code="invalid_api_key",
        )
