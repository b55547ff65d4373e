"""Run folders on one tiny base, made without training, a server process over them, a client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from manylora.adapter.selector import BranchSelector
from manylora.base import load_tokenizer
from manylora.corpus import Encoder
from manylora.recipe import parse_recipe

QUESTIONS = {
    "colour": "which colour has the sky",
    "copy": "COPY THIS WORD",
    "parity": "1 2 3 4 5 6 7 8 9",
}
RUNS = {
    "pair": ({"gate": "one_hot", "num_branches": 2, "shared_rank": 2}, ("colour", "copy")),
    "hydra": ({"method": "hydralora"}, ()),
    "three": ({"method": "lora_moe", "gate": "task"}, ("colour", "copy", "parity")),
}
ASK: Any = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "hydra", "messages": ASK, "max_tokens": 2}
_START = "from manylora.cli import main, serving; main()"


def make_run(folder: Path, base: Path, seed: int, name: str) -> Path:
    """A finished run of random weights; those with tasks have a selector for their questions."""
    adapter, tasks = RUNS[name]
    run = folder / name
    run.mkdir(parents=True)
    values = {"model": str(base), "data": "samples", "adapter": {"r": 4, **adapter}}
    recipe = parse_recipe({**values, "output": str(run)})
    config = recipe.config(max(1, len(tasks)))
    config.init_weights = False
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if tasks:
        encoder = Encoder(load_tokenizer(str(base)), 512)
        prompts = [
            encoder.prompt_ids([{"role": "user", "content": QUESTIONS[task] + more}])
            for task in tasks
            for more in ("", "?", "!", " please")
        ]
        owners = [i for i in range(len(tasks)) for _ in range(4)]
        config.branch_selector = BranchSelector.fit(prompts, owners, tasks, refuse=0.0)
    recipe.save(run)
    model.save_pretrained(str(run))
    return run


def make_runs(folder: Path, base: Path) -> list[Path]:
    return [make_run(folder, base, seed, name) for seed, name in enumerate(RUNS, 1)]


class ServerProcess:
    """`manylora serve` on a free port; `url` and `port` once it listens."""

    def __init__(self, runs: Sequence[Path], *options: str, key: str | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("MANYLORA_API_KEY", None)
        if key is not None:
            environment["MANYLORA_API_KEY"] = key
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, "serve", *map(str, runs), "--port", "0", *options],
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.log: list[str] = []
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listening.wait(120) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        self.port = int(re.findall(r":(\d+)/v1", "".join(self.log))[0])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "/v1" in line:
                self._listening.set()
        self._listening.set()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def post(
    server: ServerProcess,
    body: bytes | dict[str, Any],
    path: str = "/v1/chat/completions",
    **headers: str,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request("POST", path, data, sent)
    response = connection.getresponse()
    return response.status, json.loads(response.read()), dict(response.getheaders())


def metrics(server: ServerProcess) -> dict[str, float]:
    """What the server counts, by name and labels."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"
    }


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
