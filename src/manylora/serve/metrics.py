"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manylora_requests",
            "HTTP requests, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.answers = Counter(
            "manylora_answers",
            "Answers, by how they ended.",
            ["finish"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "manylora_prompt_tokens", "Tokens of prompts that were read.", registry=self.registry
        )
        self.answer_tokens = Counter(
            "manylora_answer_tokens", "Tokens that were written.", registry=self.registry
        )
        self.running = Gauge("manylora_running", "Answers being written.", registry=self.registry)
        self.waiting = Gauge("manylora_waiting", "Requests in the queue.", registry=self.registry)
        self.first_token = Histogram(
            "manylora_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.finished = Histogram(
            "manylora_finish_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
