"""Programs that a model wrote, run against their tests: HumanEval, MBPP, pass@k.

    pass@k = 1 - C(n - c, k) / C(n, k)     n programs, c of them right, k <= n

unbiased, the mean of it over problems being the metric (arXiv 2107.03374, eq. 1); computed as
1 - prod over j < k of (n - c - j) / (n - j), which neither overflows nor rounds.

Programs run in a child process (see confined.py for what holds it there): Linux 5.13 or later on
x86_64 or aarch64. Where the kernel cannot hold it, nothing runs. Held: time on the clock and the
processor, memory, no network or other socket, no other process, nothing written but plain files in
a temporary folder, nothing read but the interpreter's own installation, none of this process's
environment. Not held: names and sizes of files elsewhere can be looked up, and a program that goes
looking for its harness can claim to have passed, as it shares its interpreter with its tests.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHILD = Path(__file__).with_name("confined.py")
MACHINES = ("x86_64", "aarch64")
OUTPUT_BYTES = 64 << 10
FOLDER_BYTES, FOLDER_FILES, THREADS = 64 << 20, 1000, 64
LOOK_EVERY = 0.05  # seconds


class SandboxError(RuntimeError):
    """Code from a model was not allowed, or this machine cannot hold it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. passed: its last line, after its tests, was reached.

    reason: why it did not pass, or nothing. output: what it printed, its first 64 KiB.
    """

    passed: bool
    reason: str
    output: str


def run_program(
    source: str, seconds: float = 10, memory_mb: int = 1024, *, allow_code: bool
) -> Outcome:
    """Run a program with its tests, confined. allow_code: the user said that code may run.

    seconds: on the clock, the start of the interpreter included. memory_mb: address space, the
    interpreter's own (about 50 MB) included. Threads may call this side by side.
    """
    if not allow_code:
        raise SandboxError(
            "programs that a model wrote would run on this machine; say so with allow_code=True "
            "(--allow-code)"
        )
    if not math.isfinite(seconds) or seconds <= 0 or memory_mb < 64:
        raise ValueError(
            f"a program needs some seconds and at least 64 MB, not seconds={seconds}, "
            f"memory_mb={memory_mb}"
        )
    if missing := _checked_once():
        raise SandboxError(
            "this machine cannot hold programs that a model wrote, so none is run: "
            + "; ".join(missing)
        )
    return _run(source, seconds, memory_mb)


@functools.cache
def _checked_once() -> tuple[str, ...]:
    return tuple(check_sandbox())


# Each deed must fail. Run confined, with PARENT, FILE and PORT set.
PROBE = """
import os, socket
def overwrite(): open(FILE, "r+").close()
def connect(): socket.create_connection(("127.0.0.1", PORT), 1)
def fork():
    if os.fork() == 0: os._exit(0)
def hog(): bytearray(1 << 30)
deeds = {
    "changing files": overwrite,
    "reading files": lambda: open(FILE),
    "removing files": lambda: os.unlink(FILE),
    "network": connect,
    "other processes": fork,
    "signals to other processes": lambda: os.kill(PARENT, 0),
    "more memory than its limit": hog,
}
for name, deed in deeds.items():
    try:
        deed()
    except (OSError, MemoryError):
        continue
    print(name)
"""


def check_sandbox() -> list[str]:
    """What this machine cannot keep a program from, found by trying; nothing when it holds."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return [
            f"needs Linux on {' or '.join(MACHINES)}; this is {sys.platform} on "
            f"{platform.machine()}"
        ]
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        kept = Path(folder, "kept")
        kept.write_text("kept", encoding="utf-8")
        facts = {"FILE": str(kept), "PORT": server.getsockname()[1], "PARENT": os.getpid()}
        lines = [f"{name} = {value!r}" for name, value in facts.items()]
        try:
            outcome = _run("\n".join(lines) + PROBE, 30, 512)
        except SandboxError as error:
            return [str(error)]
    if not outcome.passed:
        return [f"the probe of the limits stopped: {outcome.reason}"]
    return [f"{deed}: not refused" for deed in outcome.output.splitlines()]


def _run(source: str, seconds: float, memory_mb: int) -> Outcome:
    token = secrets.token_hex()
    with tempfile.TemporaryDirectory(prefix="manylora-program-") as folder:
        order = Path(folder, "order.json")
        facts = {"seconds": seconds, "memory_mb": memory_mb, "parent": os.getpid()}
        order.write_text(json.dumps({"source": source, "token": token, **facts}), encoding="utf-8")
        hearing, telling = os.pipe()
        try:
            deadline = time.monotonic() + seconds
            process = _start(order, telling)
        except BaseException:
            os.close(hearing)
            raise
        finally:
            os.close(telling)
        try:
            printed, told, stopped = _watch(process, hearing, Path(folder), deadline, seconds)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            os.close(hearing)
    output = printed.decode("utf-8", "replace")
    said, _, report = told.decode("utf-8", "replace").partition("\n")
    if said != "ready" and not stopped:
        raise SandboxError(said or f"the process that holds the program ended: {output[-2000:]}")
    reason = stopped or _reason(report, token, process.returncode)
    return Outcome(not reason, reason, output)


def _start(order: Path, channel: int) -> subprocess.Popen[bytes]:
    # The same order of sets in every run; one thread for numpy, whose pools would fill the memory.
    environment = {
        "HOME": str(order.parent),
        "TMPDIR": str(order.parent),
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    flags = ["-s", "-P", "-B", "-X", "utf8"]
    return subprocess.Popen(
        [sys.executable, *flags, str(CHILD), str(order), str(channel)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=order.parent,
        pass_fds=(channel,),
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen[bytes], channel: int, folder: Path, deadline: float, seconds: float
) -> tuple[bytes, bytes, str]:
    """What it printed, what it told on the channel, and the limit for which it was stopped."""
    assert process.stdout is not None
    heard = {process.stdout.fileno(): bytearray(), channel: bytearray()}
    stopped, look = "", 0.0
    with selectors.DefaultSelector() as selector:
        for source in heard:
            selector.register(source, selectors.EVENT_READ)
        # Its pipes end with it, as it has no children; it may close them earlier.
        while process.poll() is None or selector.get_map():
            now = time.monotonic()
            if not stopped and now >= deadline:
                stopped = f"longer than {seconds:g} s"
            elif not stopped and now >= look:
                stopped, look = _overstepped(process.pid, folder), now + LOOK_EVERY
            if stopped:
                process.kill()
            for key, _ in selector.select(min(LOOK_EVERY, max(0.0, deadline - now))):
                found = os.read(key.fd, 1 << 16)
                if not found:
                    selector.unregister(key.fd)
                heard[key.fd] += found[: OUTPUT_BYTES - len(heard[key.fd])]
    printed, told = heard.values()
    return bytes(printed), bytes(told), stopped


def _overstepped(pid: int, folder: Path) -> str:
    """The limit, among those that the kernel does not know, that the program is beyond."""
    sizes = []
    for entry in os.scandir(folder):
        try:
            sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
        except FileNotFoundError:
            continue
    if len(sizes) > FOLDER_FILES or sum(sizes) > FOLDER_BYTES:
        return f"more than {FOLDER_FILES} files or {FOLDER_BYTES >> 20} MB in its folder"
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:  # it has just ended
        return ""
    return f"more than {THREADS} threads" if threads > THREADS else ""


def _reason(report: str, token: str, code: int) -> str:
    try:
        told = json.loads(report) if report else {}
    except ValueError:
        return "wrote to the channel of its harness"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if told == {"token": token}:
        return ""
    reason = told.get("reason") if isinstance(told, dict) else None
    if not reason:
        return f"ended before its tests did, with exit code {code}"
    return str(reason).encode("utf-8", "backslashreplace").decode()  # halves of a surrogate pair


def humaneval_program(row: Mapping[str, Any], completion: str) -> str:
    """A HumanEval row's prompt, a completion of it, its tests and the call of them."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def mbpp_program(row: Mapping[str, Any], completion: str) -> str:
    """An MBPP answer, the row's set-up (which may use it) and its tests."""
    tests: Sequence[str] = row["test_list"]
    return "\n".join([completion, row["test_setup_code"], *tests]).replace("\r\n", "\n")


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """The unbiased estimate for each problem, of n programs of which c are right."""
    total, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if k < 1 or (total < k).any() or (right < 0).any() or (right > total).any():
        raise ValueError(
            f"pass@k needs 1 <= k <= n and 0 <= c <= n; k={k}, n={total.tolist()}, "
            f"c={right.tolist()}"
        )
    drawn = np.arange(k)
    wrong = np.maximum((total - right)[..., None] - drawn, 0)
    return np.asarray(1.0 - (wrong / (total[..., None] - drawn)).prod(-1), dtype=np.float64)
