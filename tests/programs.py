"""Running a program confined, for the tests of what holds it."""

from __future__ import annotations

import textwrap

import pytest

from manylora.evaluate.code import Outcome, check_sandbox, run_program

MISSING = check_sandbox()
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


def attempt(source: str, seconds: float = 20, memory_mb: int = 512) -> Outcome:
    """What became of a program, indented or not, with the limits of the tests."""
    return run_program(textwrap.dedent(source), seconds, memory_mb, allow_code=True)
