"""Continuous batching: one thread owns the model, and requests join and leave between two tokens.

    read the prompts of requests that wait and fit, together (at most `_PROMPT_TOKENS`)
    one token for every row of the batch
    rows that ended or were cancelled leave

As Orca's iteration-level scheduling (Yu et al., OSDI 2022). Each row has its own adapter, branch,
sampling and limits; neither batch mates nor padding change what it gets.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Literal

import torch
from torch import Tensor

from manylora.serve.batch import Batch, Row
from manylora.serve.limits import ApiError, Limits
from manylora.serve.metrics import Metrics
from manylora.serve.runs import ServedRuns
from manylora.serve.sampling import Likelihood, Sampling, choose, likelihoods
from manylora.serve.text import AnswerText

_PROMPT_TOKENS = 8192
_log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to an answer; tokens: written so far, the end token included."""

    text: str
    tokens: int
    likelihood: Likelihood | None = None
    finish: Finish | None = None
    error: str = ""


@dataclass(eq=False)
class Job:
    """One request. send: called from the engine's thread with every piece; the last has a finish.

    logprobs: how many of the likeliest tokens to report beside each chosen one; None: no report.
    ignore_ends: only max_tokens and stop end the answer.
    """

    row: Row
    prompt: list[int]
    max_tokens: int
    send: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_ends: bool = False
    cancelled: bool = False
    done: bool = False
    tokens: int = 0
    last: int = 0
    text: AnswerText | None = None
    arrived: float = field(default_factory=time.monotonic)


class Engine:
    """Writes the answers of many requests at once; `start` it, `submit` jobs, `drain` it."""

    def __init__(self, runs: ServedRuns, limits: Limits, metrics: Metrics) -> None:
        self.runs, self.limits, self.metrics = runs, limits, metrics
        self.draining = False
        self.on_drained: Callable[[], None] = lambda: None
        self._changed = Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._batch = Batch(runs.model, runs.pad)
        self._thread = Thread(target=self._work, name="manylora-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 503 while draining, 429 when too many wait."""
        with self._changed:
            if self.draining:
                raise ApiError(503, "the server is shutting down", retry_after=10)
            if len(self._waiting) >= self.limits.queue + self.limits.rows - len(self._jobs):
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait already; try again later",
                    code="queue_full",
                    retry_after=1,
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: its row is free at the next step."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, "cancelled")

    def drain(self) -> None:
        """Take no more jobs; `on_drained` is called once all have ended."""
        with self._changed:
            self.draining = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread's end, after `drain`."""
        self._thread.join(seconds)

    @property
    def running(self) -> int:
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while (joining := self._next()) is not None:
                if joining:
                    self._guarded(self._admit, joining)
                if self._jobs:
                    self._guarded(self._step, self._jobs)
        finally:
            self.draining = True
            self.on_drained()

    def _next(self) -> list[Job] | None:
        """Jobs whose prompts to read now; waits where there is nothing to do; None: the end."""
        with self._changed:
            while not self._waiting and not self._jobs:
                if self.draining:
                    return None
                self._changed.wait()
            taken: list[Job] = []
            longest = 0
            while self._waiting and len(self._jobs) + len(taken) < self.limits.rows:
                longest = max(longest, len(self._waiting[0].prompt))
                if taken and longest * (len(taken) + 1) > _PROMPT_TOKENS:
                    break
                taken.append(self._waiting.popleft())
            return taken

    def _guarded(self, act: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """An error of the model ends the answers at hand, not the server."""
        try:
            act(jobs)
        except Exception as error:
            _log.exception("the model failed on %d answers", len(jobs))
            for job in [job for job in jobs if not job.done]:
                self._finish(job, "error", error=f"the model failed: {type(error).__name__}")
            if jobs is self._jobs:
                self._jobs, self._batch = [], Batch(self.runs.model, self.runs.pad)

    def _admit(self, jobs: list[Job]) -> None:
        batch = Batch(self.runs.model, self.runs.pad)
        logits = batch.read([job.row for job in jobs], [job.prompt for job in jobs])
        self.metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        going_on = self._advance(jobs, batch, logits)
        if going_on:
            self._batch.join(batch)
            self._jobs = self._jobs + going_on

    def _step(self, jobs: list[Job]) -> None:
        last = torch.tensor([job.last for job in jobs], device=self.runs.model.device)
        self._jobs = self._advance(jobs, self._batch, self._batch.step(last))

    def _advance(self, jobs: list[Job], batch: Batch, logits: Tensor) -> list[Job]:
        """Each row gets its token; the jobs that go on, which alone stay in the batch."""
        tokens = choose(logits, [job.sampling for job in jobs])
        reports = likelihoods(logits, tokens, [job.logprobs for job in jobs])
        broken = logits.isnan().any(-1).tolist()
        kept = [
            i
            for i, token in enumerate(tokens.tolist())
            if self._goes_on(jobs[i], token, reports[i], broken[i])
        ]
        if len(kept) < len(jobs):
            batch.keep(kept)
        return [jobs[i] for i in kept]

    def _goes_on(self, job: Job, token: int, report: Likelihood | None, broken: bool) -> bool:
        if job.cancelled:
            return self._finish(job, "cancelled")
        if broken:
            return self._finish(job, "error", error="the model gave NaN")
        job.tokens, job.last = job.tokens + 1, token
        self.metrics.answer_tokens.inc()
        if job.tokens == 1:
            job.text = AnswerText(self.runs.decoder, job.stop)
            self.metrics.first_token.observe(time.monotonic() - job.arrived)
        assert job.text is not None
        if token in self.runs.ends and not job.ignore_ends:
            return self._finish(job, "stop", job.text.end())
        text = job.text.add(token)
        if job.text.stopped:
            return self._finish(job, "stop", text)
        if job.tokens == job.max_tokens:
            text += job.text.end()
            return self._finish(job, "stop" if job.text.stopped else "length", text, report)
        if text or report:
            job.send(Piece(text, job.tokens, report))
        return True

    def _finish(
        self,
        job: Job,
        finish: Finish,
        text: str = "",
        report: Likelihood | None = None,
        error: str = "",
    ) -> Literal[False]:
        job.done = True
        self.metrics.answers.labels(finish).inc()
        self.metrics.finished.observe(time.monotonic() - job.arrived)
        job.send(Piece(text, job.tokens, report, finish, error))
        return False
