"""A part of what benchmarks/fuzz_requests.py does: damaged requests to a server, and the check."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuzz_check import ViolationError
from request_fuzzing import KINDS, check, is_damaged, make_request
from serving import CHAT, ServerProcess, make_runs, metrics, post, until

INPUTS = 60


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    runs = make_runs(tmp_path_factory.mktemp("runs"), tiny_folder)
    server = ServerProcess(runs, "--rows", "4", "--max-body", "20000", "--max-tokens", "8")
    yield server
    server.process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_any_request_gets_an_answer_or_an_error_of_its_own(
    kind: str, server: ServerProcess
) -> None:
    models, seen = ["hydra", "pair:copy", "three"], set()
    for number in range(INPUTS):
        judged = kind if is_damaged(number) else "chat"
        status = check(server.port, make_request(kind, number, 3, models), judged)
        assert status == "200" or is_damaged(number), number
        seen.add(status)
    assert {"200", "400"} <= seen
    assert until(lambda: metrics(server)["manylora_running"] == 0)
    assert metrics(server)["manylora_waiting"] == 0
    assert post(server, CHAT)[0] == 200
    assert "Traceback" not in "".join(server.log)


def test_the_same_seed_makes_the_same_requests() -> None:
    def made(seed: int) -> list[bytes]:
        return [make_request(kind, n, seed, ["m"]) for kind in KINDS for n in range(80)]

    assert made(1) == made(1) != made(2)
    assert len(set(made(1))) > 200


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """The port of a server that says this to anyone; None: nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                if answer is not None:
                    connection.sendall(answer)
                connection.recv(1 << 20)
                ended.wait(5 if answer is None else 0)

        ended = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        ended.set()
        thread.join(5)


def http(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


WRONG = {
    "its own fault": (http(500, b'{"error": {}}'), "status 500"),
    "no JSON": (http(200, b"{"), "status 200"),
    "nothing in it": (http(200, b"{}"), "status 200"),
    "another shape of error": (http(400, b'{"detail": "no"}'), "status 400"),
    "a stream that ends early": (
        http(200, b'data: {"choices": []}\n\n', "text/event-stream"),
        "event-stream",
    ),
    "no answer at all": (b"", "no whole answer"),
    "half an answer": (http(200, b'{"choices": []}')[:-4], "no whole answer"),
}


@pytest.mark.parametrize(("answer", "says"), WRONG.values(), ids=list(WRONG))
def test_the_check_itself_finds_what_is_wrong(answer: bytes, says: str) -> None:
    with answering(answer) as port, pytest.raises(ViolationError, match=says):
        check(port, make_request("chat", 0, 0, ["m"]), "chat")


def test_the_check_itself_finds_a_hang() -> None:
    with answering(None) as port, pytest.raises(TimeoutError):
        check(port, make_request("chat", 0, 0, ["m"]), "chat", seconds=0.5)
