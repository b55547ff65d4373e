"""Programs of a model: when they run, when they pass, and pass@k."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from manylora.evaluate import code, confined
from manylora.evaluate.code import (
    Outcome,
    SandboxError,
    check_sandbox,
    humaneval_program,
    mbpp_program,
    pass_at_k,
    run_program,
)
from programs import attempt, needs_sandbox


def test_nothing_runs_unless_the_caller_allows_it(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="allow_code=True"):
        run_program("pass", allow_code=False)
    with pytest.raises(TypeError):
        run_program("pass")  # type: ignore[call-arg]


def test_nothing_runs_where_the_limits_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_checked_once", lambda: ("network: not refused",))
    monkeypatch.setattr(code, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SandboxError, match="none is run: network: not refused"):
        run_program("pass", allow_code=True)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code.platform, "machine", lambda: "sparc64")
    assert "sparc64" in check_sandbox()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
def test_a_kernel_that_refuses_a_limit_runs_nothing(tmp_path: Path) -> None:
    """The child itself stops, whatever its caller checked: here a rule that names no folder."""
    broken = tmp_path / "confined.py"
    text = Path(confined.__file__).read_text(encoding="utf-8")
    broken.write_text(text.replace("c_long(444)", "c_long(9999)"), encoding="utf-8")
    mark = tmp_path / "mark"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "CHILD", broken)
        with pytest.raises(SandboxError, match="Landlock"):
            code._run(f"open({str(mark)!r}, 'w')", 20, 512)
        assert "Landlock" in check_sandbox()[0]
    assert not mark.exists()


@needs_sandbox
def test_a_probe_that_succeeds_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "PROBE", code.PROBE.replace("def hog(): ", "def hog(): return; "))
    assert check_sandbox() == ["more memory than its limit: not refused"]


@pytest.mark.parametrize("limits", [(0.0, 512), (float("inf"), 512), (10.0, 1)])
def test_limits_that_hold_nothing_are_refused(limits: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="at least 64 MB"):
        run_program("pass", *limits, allow_code=True)


@needs_sandbox
def test_right_programs_pass_and_wrong_ones_say_why() -> None:
    assert attempt("print('ü', 1 + 1)\nassert True") == Outcome(True, "", "ü 2\n")
    assert attempt("x = 1\nassert x == 2, 'two'").reason == "AssertionError: two (line 2)"
    assert attempt("def f(:").reason.startswith("SyntaxError")
    assert attempt("raise ValueError(chr(0xd800))").reason == r"ValueError: \ud800 (line 1)"
    assert attempt("import ctypes\nctypes.string_at(0)").reason == "killed by SIGSEGV"
    recursion = attempt("def f(): f()\nf()")
    assert not recursion.passed and recursion.reason.startswith("RecursionError")
    assert attempt("if __name__ == '__main__': assert False").passed


@needs_sandbox
@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("raise SystemExit", "SystemExit"),
        ("exit()", "SystemExit"),
        ("import os; os.kill(os.getpid(), 15)", "SIGTERM"),
        ("import os; os.closerange(3, 64)", "exit code 1"),
        ("import os; os.write(CHANNEL, b'{\"token\": 1}'); os._exit(0)", "exit code 0"),
        ("import os; os.write(CHANNEL, b'cannot: x\\n'); os._exit(0)", "wrote to the channel"),
    ],
)
def test_leaving_before_the_tests_is_no_pass(leave: str, reason: str) -> None:
    channel = "import sys; CHANNEL = int(sys.argv[2])\n"
    outcome = attempt(channel + leave)
    assert not outcome.passed and reason in outcome.reason


@needs_sandbox
def test_output_is_cut_and_does_not_stop_a_program() -> None:
    outcome = attempt("import sys\nfor _ in range(300): sys.stdout.write('x' * 99999)")
    assert outcome.passed and outcome.output == "x" * (64 << 10)
    both = attempt("import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)")
    assert both.output == "out\nerr\n"
    assert attempt("input()").reason.startswith("EOFError")
    assert attempt("import sys\nsys.stdout.close()\nsys.stderr = None").passed


HUMANEVAL = [
    {
        "prompt": f'def {name}(x):\n    """{text}"""\n',
        "canonical_solution": f"    return {solution}\n",
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(3) == {x}\n",
        "entry_point": name,
    }
    for name, text, solution, x in [
        ("double", "Twice x.", "2 * x", 6),
        ("square", "x times x.", "x ** 2", 9),
        ("odd", "Whether x is odd.", "x % 2 == 1", True),
        ("listed", "A list of x.", "[x]", [3]),
        ("digits", "x as text.", "str(x)", "'3'"),
    ]
]
MBPP = [
    {
        "code": f"def {name}(x):\r\n  return {body}",
        "test_setup_code": setup,
        "test_list": [f"assert {name}({argument}) == {expected}", "assert True"],
    }
    for name, body, setup, argument, expected in [
        ("add_one", "x + 1", "", "1", "2"),
        ("largest", "max(x)", "", "[1, 5]", "5"),
        ("negative", "-x", "three = negative(-3)", "three", "-3"),
        ("shout", "x.upper()", "", "'a'", "'A'"),
        ("count", "len(x)", "things = 'abc'\r\nmore = things", "more", "3"),
    ]
]


@needs_sandbox
@pytest.mark.parametrize("row", HUMANEVAL, ids=lambda row: str(row["entry_point"]))
def test_humaneval_answers_pass_when_right_and_only_then(row: dict[str, str]) -> None:
    assert attempt(humaneval_program(row, row["canonical_solution"])).passed
    for wrong in ("    return None\n", "    pass", "", "    exit()", "  return 1\n return 2"):
        assert not attempt(humaneval_program(row, wrong)).passed


@needs_sandbox
@pytest.mark.parametrize("row", MBPP, ids=lambda row: str(row["code"])[4:9])
def test_mbpp_answers_pass_when_right_and_only_then(row: dict[str, str]) -> None:
    assert attempt(mbpp_program(row, row["code"])).passed
    for wrong in (row["code"].split("\r\n")[0] + "\r\n  return None", "", "exit()"):
        assert not attempt(mbpp_program(row, wrong)).passed


def test_humaneval_programs_are_put_together_as_its_authors_do() -> None:
    row = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    program = humaneval_program(row, "    return 1")
    assert program == "def f():\n    return 1\ndef check(f): pass\ncheck(f)"


def test_pass_at_k_is_the_chance_that_k_drawn_programs_hold_a_right_one() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_takes_many_problems_and_many_programs() -> None:
    found = pass_at_k([10, 10, 200], [0, 10, 100], 1)
    assert found.tolist() == [0.0, 1.0, 0.5]
    # 1 - prod(1 - k / j for j in n-c+1..n), the form of the paper's own code
    authors = 1 - np.prod(1 - 100 / np.arange(200 - 7 + 1, 201))
    assert pass_at_k(200, 7, 100) == pytest.approx(authors, rel=1e-12)
    assert pass_at_k([5] * 3, [1, 2, 3], 5).tolist() == [1.0] * 3


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_pass_at_k_refuses_impossible_numbers(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)
