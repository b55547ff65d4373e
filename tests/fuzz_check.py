"""What a case must lead to: right rows, or an error a person can act on, in bounded time and room.

`check` returns what happened ("right", "refused", or "partly" for rows of both kinds), and raises
`ViolationError` for anything else.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fuzzing import Case
from manylora.corpus.layouts import CorpusError, Example
from manylora.corpus.readers import read_examples

SECONDS = 5.0
# What reading takes however small the file is: a row of the longest, read, decoded and joined.
FIXED_BYTES = 96 * 2**20
TIMES_THE_FILE = 30


class ViolationError(AssertionError):
    """An input was not handled as promised."""


class Hang(BaseException):
    """Too slow. No OSError and no Exception, so that no handler on the way takes it for its own."""


def check(case: Case, folder: Path) -> str:
    """Read the case as a file of that folder, and judge what comes out."""
    path = folder / case.name
    path.write_bytes(case.content)
    before = peak_memory(reset=True)
    good: list[Example] = []
    bad: list[CorpusError] = []
    refused: CorpusError | None = None
    try:
        with time_limit(SECONDS):
            for item in read_examples(path):
                (good if isinstance(item, Example) else bad).append(item)  # type: ignore[arg-type]
    except CorpusError as error:
        refused = error
    except Hang:
        raise ViolationError(f"no end within {SECONDS} s") from None
    except Exception as error:
        raise ViolationError(f"{type(error).__name__}: {str(error)[:200]}") from error
    grown = peak_memory() - before
    if grown > FIXED_BYTES + TIMES_THE_FILE * case.unpacked:
        raise ViolationError(f"{grown / 2**20:.0f} MiB for a file of {len(case.content)} bytes")
    for error in [*bad, *([refused] if refused else [])]:
        _check_message(str(error), path)
    for example in good:
        _check_example(example)
    if refused is None:
        _check_count(case, len(good) + len(bad))
    if case.good is not None:
        _check_known(case, good, bad, refused)
    return "refused" if refused else "partly" if bad and good else "refused" if bad else "right"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def peak_memory(reset: bool = False) -> int:
    """Bytes of memory at the most; Linux alone can begin anew."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _check_message(message: str, path: Path) -> None:
    if not message.startswith(str(path)):
        raise ViolationError(f"the message does not begin with the file: {message[:200]}")
    if len(message) > 1500 or "\0" in message:
        raise ViolationError(f"a message of {len(message)} characters: {message[:200]!r}")


def _check_example(example: Example) -> None:
    for message in example.messages:
        message["content"].encode("utf-8")
        if message["role"] in ("user", "assistant") and not message["content"].strip():
            raise ViolationError(f"{example.source}: an empty turn")
    if not example.answered or "user" not in [m["role"] for m in example.messages]:
        raise ViolationError(f"{example.source}: no exchange: {example.messages}")


def _check_count(case: Case, rows: int) -> None:
    """Where the rows of a file can be counted in another way, none may be missing."""
    expected = None
    if case.name.endswith(".jsonl"):
        lines = case.content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        expected = sum(bool(line.decode("utf-8", "replace").strip()) for line in lines)
    elif case.name.endswith(".json"):
        expected = _json_rows(case.content)
    if expected is not None and rows != expected:
        raise ViolationError(f"{rows} rows came out of {expected}")


def _json_rows(content: bytes) -> int | None:
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        lines = [line for line in content.split(b"\n") if line.strip()]
        if len(lines) > 1 and lines[1].strip().startswith(b"{"):
            return len(lines)
        raise ViolationError("read to its end, and it is not JSON") from None
    if isinstance(whole, dict):
        (whole,) = (v for v in whole.values() if v and type(v) is list and type(v[0]) is dict)
    return len(whole)


def _check_known(
    case: Case, good: list[Example], bad: list[CorpusError], refused: CorpusError | None
) -> None:
    if refused is not None:
        raise ViolationError(f"a file without damage was refused: {refused}")
    assert case.good is not None
    found = [[(m["role"], m["content"]) for m in example.messages] for example in good]
    if found != case.good:
        first = next(
            (pair for pair in zip(found, case.good, strict=False) if pair[0] != pair[1]), None
        )
        raise ViolationError(
            f"{len(found)} rows for {len(case.good)}; the first that differs: {first}"
        )
    if len(bad) != case.bad:
        raise ViolationError(f"{len(bad)} bad rows, where {case.bad} were spoilt: {bad[:1]}")
