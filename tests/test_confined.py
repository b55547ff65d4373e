"""What holds the programs of a model, tried by programs that break out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manylora.evaluate import code
from manylora.evaluate.code import Outcome
from programs import attempt, needs_sandbox


def processes_with(folder: Path) -> set[int]:
    """Those that were started with a path in this folder, and what they forked."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and bytes(folder) in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@needs_sandbox
def test_an_endless_loop_ends_by_the_clock() -> None:
    start = time.monotonic()
    for loop in ("while True: pass", "import time; time.sleep(99)", "while True: print('x' * 999)"):
        stubborn = "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\n"
        assert attempt(stubborn + loop, seconds=1).reason == "longer than 1 s"
    assert time.monotonic() - start < 9
    assert attempt("try:\n while True: pass\nexcept BaseException: pass", 1).passed is False


@needs_sandbox
def test_memory_is_limited() -> None:
    for hog in ("bytearray(1 << 30)", "[bytearray(1 << 20) for _ in range(2000)]"):
        assert attempt(hog, memory_mb=256).reason.startswith("MemoryError")
    kept = "held = []\nwhile True: held.append('x' * 100000)"
    assert attempt(kept, memory_mb=256).reason == "MemoryError"
    raised = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    """
    assert attempt(raised).reason.startswith("ValueError")
    assert attempt("import mmap\nmmap.mmap(-1, 1 << 30)").reason.startswith("OSError")
    assert attempt("import os\nos.memfd_create('x')").reason.startswith("PermissionError")


@needs_sandbox
@pytest.mark.parametrize(
    "birth",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.fork() or exec('while True: pass')",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '99'], {})",
        "import os\nos.execv('/bin/sleep', ['sleep', '99'])",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
        "if l.syscall(CLONE, 17, 0, 0, 0, 0) < 0: raise OSError(ctypes.get_errno(), '')\n"
        "while True: pass",
    ],
)
def test_no_program_has_children_to_leave_behind(
    birth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork bomb does not start, so nothing of it can outlive the program."""
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    clone = 56 if code.platform.machine() == "x86_64" else 220
    outcome = attempt(f"CLONE = {clone}\n{birth}")
    assert outcome.reason.startswith("PermissionError")
    assert not processes_with(tmp_path)
    caught = f"try:\n{textwrap.indent(birth, ' ')}\nexcept OSError: pass"
    assert attempt(f"CLONE = {clone}\n{caught}").passed


@needs_sandbox
def test_a_bomb_of_threads_is_stopped() -> None:
    bomb = """
        import threading, time
        threading.stack_size(32768)
        while True: threading.Thread(target=time.sleep, args=(99,)).start()
    """
    assert attempt(bomb, memory_mb=2048).reason == "more than 64 threads"
    few = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
    """
    assert attempt(few).passed


@needs_sandbox
def test_files_outside_stay_as_they_are(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "folder").mkdir()
    before = kept.stat()
    deeds = [
        "os.remove(KEPT)",
        "shutil.rmtree(ROOM)",
        "os.rmdir(ROOM + '/folder')",
        "open(KEPT, 'w')",
        "open(KEPT, 'a')",
        "open(ROOM + '/new', 'w')",
        "os.mkdir(ROOM + '/new')",
        "os.symlink(KEPT, ROOM + '/new')",
        "os.link(KEPT, 'link')",
        "os.rename(KEPT, 'moved')",
        "os.replace('mine', KEPT)",
        "os.truncate(KEPT, 0)",
        "os.open(KEPT, os.O_RDONLY | os.O_TRUNC)",
        "os.open(KEPT, 3 | os.O_TRUNC)",
        "os.chmod(KEPT, 0)",
        "os.chown(KEPT, 1, 1)",
        "os.utime(KEPT, (0, 0))",
        "os.setxattr(KEPT, 'user.x', b'')",
        "os.mknod(ROOM + '/new')",
        "os.chroot(ROOM)",
        "open(KEPT)",
        "os.listdir(ROOM)",
        "open('/etc/passwd')",
        "open('/dev/shm/manylora', 'w')",
        "open(os.path.expanduser('~') + '/../manylora', 'w')",
    ]
    places = f"KEPT, ROOM = {str(kept)!r}, {str(tmp_path)!r}"
    tried = "\n".join(f"try: {deed}\nexcept OSError: pass\nelse: print({deed!r})" for deed in deeds)
    outcome = attempt(f"import os, shutil\n{places}\nopen('mine', 'w').write('own')\n{tried}")
    assert outcome == Outcome(True, "", "")
    assert kept.read_text() == "kept"
    after = kept.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]


@needs_sandbox
def test_the_working_folder_is_writable_limited_and_gone_afterwards() -> None:
    works = """
        import os, tempfile
        with open("a", "w") as file: file.write("x")
        os.rename("a", "b")
        assert open("b").read() == "x" and os.listdir() == ["b"]
        with tempfile.TemporaryFile() as file: file.write(b"y")
        print(os.getcwd())
    """
    outcome = attempt(works)
    assert outcome.passed, outcome.reason
    assert not Path(outcome.output.strip()).exists()
    assert attempt("open('big', 'wb').write(bytes(17 << 20))").reason.startswith("OSError")
    full = "more than 1000 files or 64 MB in its folder"
    assert attempt("for i in range(99999): open(str(i), 'w')").reason == full
    assert attempt("i = 0\nwhile True:\n i += 1; open(str(i), 'w').write('x' * 9999999)").reason


@needs_sandbox
def test_no_socket_reaches_a_listener(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        server.setblocking(False)
        local.bind(str(tmp_path / "s"))
        local.listen()
        local.setblocking(False)
        port = server.getsockname()[1]
        for family, kind, address in [
            ("AF_INET", "SOCK_STREAM", ("127.0.0.1", port)),
            ("AF_INET", "SOCK_DGRAM", ("127.0.0.1", port)),
            ("AF_INET6", "SOCK_STREAM", ("::1", port)),
            ("AF_UNIX", "SOCK_STREAM", str(tmp_path / "s")),
        ]:
            source = f"import socket as s\ns.socket(s.{family}, s.{kind}).connect({address!r})"
            assert attempt(source).reason.startswith("PermissionError")
        for listener in (server, local):
            with pytest.raises(BlockingIOError):
                listener.accept()


@needs_sandbox
def test_nothing_of_the_parents_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    seen = attempt("import os\nprint(dict(os.environ))")
    assert seen.passed and "hunter2" not in seen.output and "SECRET" not in seen.output
    reads = "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())"
    assert attempt(reads).reason.startswith("PermissionError")
    assert attempt("open('/proc/self/environ')").reason.startswith("PermissionError")


@needs_sandbox
def test_no_other_process_is_touched() -> None:
    """Neither this process nor a bystander of the same user."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    received: list[int] = []
    old = signal.signal(signal.SIGIO, lambda number, _: received.append(number))
    try:
        deeds = [
            "os.kill(OTHER, 9)",
            "os.kill(os.getppid(), 9)",
            "os.kill(0, 0)",
            "os.kill(-1, 0)",
            "os.killpg(os.getpgid(OTHER), 0)",
            "signal.pidfd_send_signal(os.pidfd_open(OTHER), 9)",
            "resource.prlimit(OTHER, resource.RLIMIT_CPU, (0, 0))",
            "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
            "os.sched_setaffinity(OTHER, {0})",
            "fcntl.fcntl(1, 8, os.getppid())",
            "fcntl.ioctl(1, 0x8901, struct.pack('i', os.getppid()))",
        ]
        tried = "\n".join(
            f"try: {deed}\nexcept OSError: pass\nelse: print({deed!r})" for deed in deeds
        )
        start = f"import fcntl, os, resource, signal, struct\nOTHER = {bystander.pid}\n"
        assert attempt(start + tried) == Outcome(True, "", "")
        assert bystander.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, 0) == priority and not received
    finally:
        signal.signal(signal.SIGIO, old)
        bystander.kill()
        bystander.wait()


@needs_sandbox
def test_roots_rights_are_gone() -> None:
    for deed in ("os.setuid(12345)", "os.setgroups([12345])"):
        assert attempt(f"import os\n{deed}").reason.startswith("PermissionError")


@needs_sandbox
def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    script = f"""
        import tempfile
        from manylora.evaluate.code import run_program
        run_program("1", allow_code=True)
        tempfile.tempdir = {str(tmp_path)!r}
        run_program("import time; time.sleep(60)", 60, 512, allow_code=True)
    """
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        assert waited(lambda: bool(processes_with(tmp_path)), 60)
    finally:
        runner.kill()
        runner.wait()
    assert waited(lambda: not processes_with(tmp_path), 10)


def waited(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@needs_sandbox
def test_programs_side_by_side_do_not_disturb_each_other() -> None:
    sources = [
        f"""
        import os, time
        open("own", "w").write("{i}")
        print("{i}" * 50000, flush=True)
        time.sleep(0.3)
        assert open("own").read() == "{i}" and os.listdir() == ["own"]
        assert {i} % 4, "every fourth fails"
        """
        for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda source: attempt(source, 60), sources))
    for i, outcome in enumerate(outcomes):
        assert outcome.output == str(i) * 50000 + "\n"
        assert outcome.passed == bool(i % 4), outcome.reason
    assert "every fourth fails" in outcomes[4].reason
