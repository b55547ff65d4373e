"""The routes: a request is read within limits, checked, queued, and its answer sent as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from manylora.serve import protocol
from manylora.serve.engine import Engine, Job, Piece
from manylora.serve.gate import HANDLERS, Gate
from manylora.serve.limits import ApiError
from manylora.serve.protocol import ChatRequest, CompletionRequest, parse
from manylora.serve.replies import DONE, Reply, event
from manylora.serve.runs import Choice, PromptError
from manylora.serve.sampling import Sampling


@dataclass
class Asked:
    """A job in the queue, where its pieces arrive, and what its reply looks like."""

    job: Job
    pieces: asyncio.Queue[Piece]
    reply: Reply


class Api:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, started: int) -> None:
        self.engine, self.runs, self.limits = engine, engine.runs, engine.limits
        self.started = started

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def models(self, request: Request) -> Response:
        """Every name that `model` may have, or the one that is asked for."""
        name = request.path_params.get("name")
        if name is not None:
            self._choice(name)
            return JSONResponse(self._card(name))
        cards = [self._card(name) for name in self.runs.models]
        return JSONResponse({"object": "list", "data": cards})

    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        status = "draining" if self.engine.draining else "ok"
        return JSONResponse({"status": status}, 503 if self.engine.draining else 200)

    async def metrics(self, request: Request) -> Response:
        self.engine.metrics.running.set(self.engine.running)
        self.engine.metrics.waiting.set(self.engine.waiting)
        text = self.engine.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "manylora"}

    async def _answer(self, request: Request, kind: type[protocol.Request]) -> Response:
        wanted = parse(kind, await self._body(request))
        choice = self._choice(wanted.model)
        prompt = await self._prompt(wanted)
        asked = await self._submit(wanted, choice, prompt)
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            stream = self._stream(asked, bool(usage))
            return StreamingResponse(stream, media_type="text/event-stream")
        watch = asyncio.create_task(self._cancel_if_gone(request, asked.job))
        try:
            pieces = [await asked.pieces.get()]
            while pieces[-1].finish is None:
                pieces.append(await asked.pieces.get())
        finally:
            watch.cancel()
            self.engine.cancel(asked.job)
        if pieces[-1].finish == "error":
            raise ApiError(500, pieces[-1].error)
        return JSONResponse(asked.reply.whole(pieces))

    async def _stream(self, asked: Asked, usage: bool) -> AsyncIterator[bytes]:
        # When the client goes, Starlette cancels this, and the job's row becomes free.
        try:
            for chunk in asked.reply.opening():
                yield event(chunk)
            while True:
                piece = await asked.pieces.get()
                if piece.finish == "error":
                    yield event(ApiError(500, piece.error).body())
                    return
                yield event(asked.reply.piece(piece))
                if piece.finish is not None:
                    break
            if usage:
                yield event(asked.reply.closing(piece))
            yield DONE
        finally:
            self.engine.cancel(asked.job)

    async def _cancel_if_gone(self, request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(job)

    async def _body(self, request: Request) -> bytes:
        """ApiError 415, 413 or 408 for a body of another type, too large or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "send JSON, with the header Content-Type: application/json")
        body, most = bytearray(), self.limits.body
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"the request is larger than {most} bytes")
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise ApiError(408, f"the request took longer than {seconds:g} s to arrive") from None
        return bytes(body)

    def _choice(self, model: str) -> Choice:
        if model not in self.runs.models:
            known = ", ".join(self.runs.models)
            raise ApiError(
                404,
                f"no model {model[:100]!r}; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return self.runs.models[model]

    async def _prompt(self, wanted: protocol.Request) -> list[int]:
        try:
            prompt = await run_in_threadpool(self._token_ids, wanted)
            self.runs.check(prompt)
        except PromptError as error:
            param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
            raise ApiError(400, str(error), param=param) from None
        return prompt

    def _token_ids(self, wanted: protocol.Request) -> list[int]:
        if isinstance(wanted, ChatRequest):
            return self.runs.chat_ids([message.as_message() for message in wanted.messages])
        given = wanted.text_or_ids
        return self.runs.text_ids(given) if isinstance(given, str) else given

    def _room(self, wanted: protocol.Request, prompt: int) -> int:
        """How many tokens the answer may have; ApiError 400 where prompt or answer are too long."""
        context = self.runs.context
        most = min(self.limits.prompt_tokens or context, context - 1)
        room = min(self.limits.max_tokens, context - prompt)
        code = "context_length_exceeded"
        if prompt > most:
            message = f"the prompt has {prompt} tokens; at most {most} are taken"
            raise ApiError(400, message, code=code)
        if wanted.limit is None:
            return min(room, wanted.default_limit or room)
        if wanted.limit > room:
            message = (
                f"{wanted.limit} tokens are asked for; after a prompt of {prompt} tokens at most "
                f"{room} are given"
            )
            raise ApiError(400, message, param="max_tokens", code=code)
        return wanted.limit

    async def _submit(self, wanted: protocol.Request, choice: Choice, prompt: list[int]) -> Asked:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        most = self._room(wanted, len(prompt))

        def send(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        row = await run_in_threadpool(choice.row, prompt)
        job = Job(
            row,
            prompt,
            most,
            send,
            Sampling(
                1.0 if wanted.temperature is None else wanted.temperature,
                1.0 if wanted.top_p is None else wanted.top_p,
                Random(wanted.seed),
            ),
            wanted.stops,
            wanted.reported,
            wanted.ignore_eos,
        )
        chat, branch = isinstance(wanted, ChatRequest), choice.branch_name(row)
        reply = Reply(wanted.model, branch, len(prompt), self.runs.decoder, chat)
        self.engine.submit(job)
        return Asked(job, pieces, reply)


def create_app(engine: Engine, key: str | None, started: int, local: bool) -> ASGIApp:
    """The ASGI application over a started engine; key and local: as `Gate` takes them."""
    api = Api(engine, started)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.models),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
    ]
    return Gate(Starlette(routes=routes, exception_handlers=HANDLERS), engine.metrics, key, local)
