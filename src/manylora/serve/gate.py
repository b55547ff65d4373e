"""What stands before the routes and behind them: who may ask, what is counted, how errors look."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from manylora.serve.limits import ApiError, check_key, is_loopback
from manylora.serve.metrics import Metrics

_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Gate:
    """Asks for the key (except for /health), and counts every request by its status.

    local: only requests that name this machine as their host are taken, so that a web page whose
    own name was pointed here cannot ask through a browser.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, local: bool) -> None:
        self.app, self.metrics, self.key, self.local = app, metrics, key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan, no websocket

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in _COUNTED else "other"
                self.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await as_response(error)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.local and not is_loopback(_hostname(headers.get(b"host", ""))):
            raise ApiError(403, "this server answers to localhost and 127.0.0.1 alone")
        if scope["path"] != "/health":
            check_key(headers.get(b"authorization"), self.key)


def _hostname(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def as_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return as_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    return as_response(ApiError(error.status_code, message))


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_failure(request: Request, error: Exception) -> Response:
    return as_response(ApiError(500, "the server failed; its log says why"))  # uvicorn logs it


HANDLERS: dict[type[Exception] | int, ExceptionHandler] = {
    ApiError: _on_api_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_gone,
    Exception: _on_failure,
}
