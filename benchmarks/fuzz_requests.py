"""Damaged requests to a live server over a tiny model; statuses are counted and kept.

python benchmarks/fuzz_requests.py --inputs 10000   # of all kinds together, into results/
python benchmarks/fuzz_requests.py --inputs 300 --only http --seed 7 --no-keep

Each kind gets a server process of its own with three runs (routed, one-hot, a learned gate):
damaged JSON for chat and for completions, and broken HTTP. The requests are made and judged in
tests/request_fuzzing.py: an answer or the sender's own error within 40 seconds, never a status of
500 or more. Afterwards the server has no request left over, has logged no traceback, answers as
before, and ends in order on SIGTERM.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from in_children import command, fuzz

from fuzz_check import ViolationError
from request_fuzzing import KINDS, check, is_damaged, make_request
from serving import CHAT, RUNS, ServerProcess, make_runs, metrics, post, until
from tiny import save_tiny_model

OPTIONS = ("--rows", "8", "--queue", "8", "--max-body", "20000", "--max-tokens", "8")


def work(
    server: ServerProcess,
    models: Sequence[str],
    kind: str,
    start: int,
    stop: int,
    seed: int,
    results: Connection,
) -> None:
    """Sends (number, outcome, message, seconds) for each request."""
    for number in range(start, stop):
        raw, message = make_request(kind, number, seed, models), ""
        began = time.perf_counter()
        try:
            # One without damage has said all there is: it may take its time to be answered.
            outcome = check(server.port, raw, kind if is_damaged(number) else "chat")
            if not is_damaged(number) and outcome != "200":
                raise ViolationError(f"status {outcome} for a request without damage")
        except TimeoutError:
            outcome, message = "hangs", "no answer"
        except (ViolationError, OSError) as error:  # OSError: nobody listens any more
            outcome, message = "violations", f"{type(error).__name__}: {error}"
        results.send((number, outcome, message, time.perf_counter() - began))


def fuzz_kind(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    """Counts of outcomes against a server of its own, which is looked at afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        base = save_tiny_model(Path(folder) / "base")
        server = ServerProcess(make_runs(Path(folder), base), *OPTIONS)
        models = [*RUNS, "pair:copy", "three:parity", base.name]
        try:
            found = fuzz(partial(work, server, models), kind, inputs, seed, ("200",))
            try:
                check_alive(server)
            except ViolationError as error:
                print(f"{kind}: {error}", file=sys.stderr)
                found["violations"] += 1
        finally:
            server.process.kill()
    return found


def check_alive(server: ServerProcess) -> None:
    """Nothing is left of all the requests, and the next one is answered."""
    left = ("manylora_running", "manylora_waiting")
    if not until(lambda: not any(metrics(server)[name] for name in left)):
        raise ViolationError("requests are left that nobody waits for")
    if post(server, CHAT)[0] != 200:
        raise ViolationError("a request without damage is not answered any more")
    if code := server.stop():
        raise ViolationError(f"SIGTERM ended the server with {code}")
    if "Traceback" in (log := "".join(server.log)):
        raise ViolationError(f"the log has a traceback: {log[log.index('Traceback') :][-600:]}")


def main() -> None:
    command(str(__doc__), KINDS, "requests", "fuzz_requests.json", fuzz_kind)


if __name__ == "__main__":
    main()
