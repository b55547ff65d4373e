"""`manylora serve` as a process, asked by the official client and by clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from manylora.predict import predict_file
from serving import ASK, CHAT, QUESTIONS, ServerProcess, make_runs, metrics, post, until


@pytest.fixture(scope="module")
def run_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_folder)


@pytest.fixture(scope="module")
def server(run_folders: list[Path]) -> Iterator[ServerProcess]:
    server = ServerProcess(run_folders, "--rows", "4", "--queue", "4", "--max-body", "20000")
    yield server
    server.process.kill()


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60)


def test_a_chat_answers_as_predict_does(
    client: openai.OpenAI, run_folders: list[Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": q}) + "\n" for q in QUESTIONS.values()))
    for run in run_folders:
        for row in predict_file(run, rows, max_new_tokens=12):
            answer = client.chat.completions.create(
                model=run.name, messages=row["messages"], temperature=0, max_completion_tokens=12
            )
            assert answer.choices[0].message.content == row["prediction"]
            assert answer.model_extra["manylora_branch"] == row.get("branch")
            assert answer.usage.total_tokens == (
                answer.usage.prompt_tokens + answer.usage.completion_tokens
            )


def test_a_named_task_takes_its_branch(client: openai.OpenAI) -> None:
    answers = {
        name: client.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=12)
        for name in ("three:colour", "three:parity", "hydra")
    }
    assert answers["three:parity"].model_extra["manylora_branch"] == "parity"
    assert len({answer.choices[0].message.content for answer in answers.values()}) == 3


def test_a_stream_brings_the_same_text_logprobs_and_usage(client: openai.OpenAI) -> None:
    options: Any = {"model": "hydra", "messages": ASK, "temperature": 0, "max_tokens": 12}
    options |= {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reports = [
        e
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for e in c.choices[0].logprobs.content
    ]
    assert text == whole.choices[0].message.content
    assert reports == whole.choices[0].logprobs.content
    assert len(reports) == whole.usage.completion_tokens == 12
    assert all(len(report.top_logprobs) == 3 for report in reports)
    assert all(report.logprob == report.top_logprobs[0].logprob for report in reports)
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_completions_take_text_and_tokens(client: openai.OpenAI) -> None:
    options: Any = {"model": "hydra", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="hello", logprobs=2, **options)
    parts = client.completions.create(prompt="hello", stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert logprobs.text_offset[0] == 0 and len(logprobs.top_logprobs[0]) == 2
    assert (
        client.completions.create(prompt=["hello"], **options).choices[0].text
        == whole.choices[0].text
    )
    tokens = client.completions.create(prompt=[5, 6, 7], **options)
    assert tokens.usage.prompt_tokens == 3


def test_a_stop_string_is_not_sent(client: openai.OpenAI) -> None:
    options: Any = {"model": "hydra", "messages": ASK, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[4:6]
    chunks = list(client.chat.completions.create(**options, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="hydra", messages=ASK, temperature=1.5, seed=seed, max_tokens=20
        )
        return str(answer.choices[0].message.content)

    assert ask(1) == ask(1) != ask(2)


def test_models_are_the_runs_their_tasks_and_the_base(
    client: openai.OpenAI, tiny_folder: Path
) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [
        *("pair", "pair:colour", "pair:copy", "hydra"),
        *("three", "three:colour", "three:copy", "three:parity", tiny_folder.name),
    ]
    assert client.models.retrieve("three:copy").id == "three:copy"
    with pytest.raises(openai.NotFoundError, match="no model 'four'"):
        client.models.retrieve("four")


BAD: list[tuple[bytes | dict[str, Any], int, str]] = [
    (b"{", 400, "JSON"),
    (b"", 400, "JSON"),
    (b"[" * 5000, 400, "JSON"),
    (b"[]", 400, "object"),
    (b"\xff\xfe", 400, "JSON"),
    (b'{"model": "hydra", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
    (CHAT | {"model": "nobody"}, 404, "no model 'nobody'; this server has pair"),
    (CHAT | {"model": 5}, 400, "model"),
    (CHAT | {"messages": []}, 400, "messages"),
    (CHAT | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    (CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT | {"max_tokens": -1}, 400, "max_tokens"),
    (CHAT | {"max_tokens": 10**30}, 400, "max_tokens"),
    (CHAT | {"max_tokens": 100_000}, 400, "100000 tokens are asked for"),
    (CHAT | {"max_tokens": "2"}, 400, "max_tokens"),
    (CHAT | {"max_completion_tokens": 3}, 400, "not both"),
    (CHAT | {"temperature": float("nan")}, 400, "temperature"),
    (CHAT | {"temperature": 3}, 400, "temperature"),
    (CHAT | {"top_p": -0.1}, 400, "top_p"),
    (CHAT | {"seed": 10**40}, 400, "seed"),
    (CHAT | {"stop": ["x"] * 17}, 400, "17 strings"),
    (CHAT | {"stop": [""]}, 400, "stop"),
    (CHAT | {"n": 2}, 400, "n: "),
    (CHAT | {"tools": [{}]}, 400, "tools"),
    (CHAT | {"functions": []}, 400, "functions: not supported"),
    (CHAT | {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    (CHAT | {"top_logprobs": 2}, 400, "logprobs=true"),
    (CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT | {"stream_options": {"include_usage": True}}, 400, "stream=true"),
    (CHAT | {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "at most 511 are taken"),
    (CHAT | {"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, "20000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "says"), BAD)
def test_a_bad_request_is_told_what_is_wrong(
    server: ServerProcess, body: bytes | dict[str, Any], status: int, says: str
) -> None:
    found, answer, _ = post(server, body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert says in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("prompt", ["", [], [10**30], [-1], ["a", "b"], [1, "a"], [[1]], None, 5])
def test_a_bad_prompt_is_told_what_is_wrong(server: ServerProcess, prompt: Any) -> None:
    body = {"model": "hydra", "prompt": prompt, "max_tokens": 2}
    status, answer, _ = post(server, body, "/v1/completions")
    assert status == 400 and "prompt" in answer["error"]["message"]


def test_other_types_methods_paths_and_hosts_are_refused(server: ServerProcess) -> None:
    assert post(server, CHAT, Content_Type="text/plain")[0] == 415
    assert post(server, CHAT, "/v1/embeddings")[0] == 404
    assert post(server, CHAT, "/v1/models")[0] == 405
    assert post(server, CHAT, Host="example.org")[0] == 403
    assert post(server, CHAT, Host="[::")[0] == 403
    assert post(server, CHAT, Host="localhost:1")[0] == 200


def test_metrics_count_requests_and_tokens(server: ServerProcess, client: openai.OpenAI) -> None:
    before = metrics(server)
    answer = client.chat.completions.create(**CHAT)
    after = metrics(server)
    ok = 'manylora_requests_total{route="/v1/chat/completions",status="200"}'
    assert after[ok] == before[ok] + 1
    for name, count in (
        ("prompt", answer.usage.prompt_tokens),
        ("answer", answer.usage.completion_tokens),
    ):
        key = f"manylora_{name}_tokens_total"
        assert after[key] == before[key] + count


ENDLESS: dict[str, Any] = CHAT | {"max_tokens": 450, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_row(server: ServerProcess, stream: bool) -> None:
    cancelled = 'manylora_answers_total{finish="cancelled"}'
    before = metrics(server).get(cancelled, 0)
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        gone.sendall(head.encode() + body)
        assert until(lambda: metrics(server)["manylora_running"] == 1)
    assert until(lambda: metrics(server)["manylora_running"] == 0)
    assert metrics(server)[cancelled] == before + 1


def test_more_than_rows_and_queue_are_told_to_come_back(server: ServerProcess) -> None:
    client = openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60)

    async def ask(seed: int) -> str | None:
        try:
            answer = await client.chat.completions.create(**CHAT | {"max_tokens": 60}, seed=seed)
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"]
        return answer.choices[0].finish_reason

    async def together() -> list[str | None]:
        return await asyncio.gather(*(ask(seed) for seed in range(40)))

    found = asyncio.run(together())
    assert "1" in found
    assert {"stop", "length"} & set(found)
    assert set(found) <= {"1", "stop", "length"}
