"""`manylora serve` as a process: its key, and how it ends."""

from __future__ import annotations

import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from manylora.serve.limits import check_host, is_loopback
from serving import CHAT, ServerProcess, make_run, post, until


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), tiny_folder, 2, "hydra")


def endless(client: openai.OpenAI, count: int) -> list[Any]:
    """Streams that have begun, and have 449 tokens to go."""
    extra = {"ignore_eos": True}
    options = CHAT | {"max_tokens": 450, "stream": True}
    return [client.chat.completions.create(**options, extra_body=extra) for _ in range(count)]


def test_sigterm_finishes_what_runs_and_refuses_more(run_folder: Path) -> None:
    server = ServerProcess([run_folder])
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60)
    streams = endless(client, 4)
    server.process.send_signal(signal.SIGTERM)
    assert until(lambda: any("finishing" in line for line in server.log))
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(**CHAT)
    assert refused.value.status_code == 503
    assert [list(stream)[-1].choices[0].finish_reason for stream in streams] == ["length"] * 4
    assert server.process.wait(30) == 0
    assert "Traceback" not in "".join(server.log)


def test_a_key_is_asked_for_and_a_second_signal_ends_at_once(run_folder: Path) -> None:
    server = ServerProcess([run_folder], key="secret")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="guess", max_retries=0).models.list()
    assert post(server, CHAT)[0] == 401
    assert post(server, CHAT, Authorization="Bearer \xe4")[0] == 401
    connection = HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    client = openai.OpenAI(base_url=server.url, api_key="secret", max_retries=0, timeout=60)
    stream = endless(client, 1)[0]
    server.process.send_signal(signal.SIGTERM)
    assert until(lambda: any("finishing" in line for line in server.log))
    assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
    with pytest.raises(openai.APIConnectionError):
        list(stream)


def test_other_machines_need_a_key() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    check_host("127.0.0.1", None, False)
    check_host("0.0.0.0", "secret", False)
    check_host("0.0.0.0", None, True)
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ValueError, match="MANYLORA_API_KEY"):
            check_host(host, None, False)
    with pytest.raises(ValueError, match="empty"):
        check_host("127.0.0.1", "", False)
