"""Many clients at once: streams of equal length against `manylora serve`.

    python benchmarks/serve_load.py RUN [RUN ...] [--streams 64] [--tokens 128] [--output FILE]

Starts a server over the runs on a free port, warms it up, and then opens all streams together with
the official client, `--rounds` times; the streams take turns in using the models that the server
offers, so that adapters and branches are mixed in its batches. Prints and keeps errors, the time
to the first token, to the end (p50, p99), and tokens a second. Fails where there is an error or
where p99 is more than 3 times p50.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
from here import about_here

QUESTION = "Name a colour that rhymes with word number {:03d} of the list, and say why."
Times = tuple[float, float, int]  # seconds to the first token and to the end; tokens


@contextmanager
def serving(runs: list[Path]) -> Iterator[str]:
    """The address of a server over the runs, stopped as SIGTERM stops it."""
    command = [sys.executable, "-m", "manylora", "serve", *map(str, runs), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [""]
        while " on http://" not in said[-1]:
            said.append(process.stderr.readline())
            if not said[-1]:
                raise SystemExit("the server did not start:\n" + "".join(said))
        try:
            yield said[-1].split()[-1]
        finally:
            process.terminate()


async def one(client: openai.AsyncOpenAI, model: str, number: int, tokens: int) -> Times:
    """A stream of so many tokens, whatever the model would say."""
    start = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION.format(number)}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,  # a chunk for every token, also where it has no text of its own
        extra_body={"ignore_eos": True},
    )
    first, written = None, 0
    async for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].logprobs:
            first = time.perf_counter() - start
        if chunk.usage is not None:
            written = chunk.usage.completion_tokens
    if first is None or written != tokens:
        raise RuntimeError(f"{written} tokens instead of {tokens}")
    return first, time.perf_counter() - start, written


async def measure(url: str, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """All rounds together, after a short one of as many streams."""
    limits = openai.DefaultAsyncHttpxClient(timeout=None)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=limits)
    models = [model.id async for model in client.models.list()]
    found: list[Times] = []
    errors: list[str] = []
    seconds = 0.0
    for number in range(rounds + 1):
        wanted = tokens if number else 2
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(one(client, models[i % len(models)], i, wanted) for i in range(streams)),
            return_exceptions=True,
        )
        errors += [repr(answer) for answer in answers if isinstance(answer, BaseException)]
        if number:
            seconds += time.perf_counter() - start
            found += [answer for answer in answers if not isinstance(answer, BaseException)]
    first, end, written = np.array(found or [(np.nan, np.nan, 0)]).T
    p50, p99 = (float(value) for value in np.percentile(end, [50, 99]))
    return {
        "models": models,
        "errors": errors,
        "first_token_p50_s": float(np.percentile(first, 50)),
        "finish_p50_s": p50,
        "finish_p99_s": p99,
        "p99_over_p50": p99 / p50,
        "tokens_per_second": float(written.sum()) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with serving(options.runs) as url:
        found = asyncio.run(measure(url, options.streams, options.tokens, options.rounds))
    size = {name: getattr(options, name) for name in ("streams", "tokens", "rounds")}
    print(json.dumps({**size, **found}, indent=2))
    if options.output is not None:
        result = {**about_here(), **size, **found}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if found["errors"] or not found["p99_over_p50"] <= 3:
        raise SystemExit("missed: no error, and p99 at most 3 x p50")


if __name__ == "__main__":
    main()
