"""pass@k of held-out rows that carry tests: the model's programs, run confined against them.

A program is the code of an answer, then the row's tests. One answer a row is written greedily; more
are drawn, as lm-eval's humaneval_64 has it, at temperature 0.2 and top-p 0.95. pass@k is the
unbiased estimate of arXiv 2107.03374 (code.py), for k = 1 and 10 where as many were written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from manylora.corpus import Example
from manylora.evaluate.answers import Sampling
from manylora.evaluate.code import Outcome, pass_at_k, run_program

K = (1, 10)
SECONDS, MEMORY_MB = 10.0, 1024
TEMPERATURE, TOP_P = 0.2, 0.95
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Programs:
    """That programs may run, and how many are written for each row.

    temperature: None for greedy decoding of one program, and for 0.2 of several. seconds,
    memory_mb: the limits of one program, as `run_program` has them.
    """

    samples: int = 1
    temperature: float | None = None
    seconds: float = SECONDS
    memory_mb: int = MEMORY_MB

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: give 1 or more")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature}: give more than 0, or leave it out for the "
                "likeliest answer"
            )

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn; None for greedy decoding."""
        if self.samples == 1 and self.temperature is None:
            return None
        return Sampling(self.temperature or TEMPERATURE, TOP_P)

    def pass_rates(
        self, examples: Sequence[Example], answers: Sequence[Sequence[str]]
    ) -> dict[str, list[float]]:
        """pass@k of each row. answers: `samples` of each row's, as the model wrote them."""
        written = [
            program(example, answer)
            for example, own in zip(examples, answers, strict=True)
            for answer in own
        ]
        passed = [outcome.passed for outcome in self.run(written)]
        n = self.samples
        right = [sum(passed[i : i + n]) for i in range(0, len(passed), n)]
        return {f"pass@{k}": pass_at_k(n, right, k).tolist() for k in K if k <= n}

    def run(self, sources: Sequence[str]) -> list[Outcome]:
        """What became of each program; they run side by side."""
        run = partial(run_program, seconds=self.seconds, memory_mb=self.memory_mb, allow_code=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(run, sources))


def program(example: Example, answer: str) -> str:
    """The code of an answer to a row, and the row's tests after it."""
    return f"{code_of(answer)}\n{example.tests}\n".replace("\r\n", "\n")


def code_of(answer: str) -> str:
    """The first ``` block of Python, or else the first of any, or else the whole answer."""
    blocks = [(match[1].casefold(), match[2]) for match in _FENCE.finditer(answer)]
    python = [code for name, code in blocks if name in ("python", "python3", "py")]
    return next(iter([*python, *(code for _, code in blocks)]), answer)


def own_answers_that_fail(name: str, examples: Sequence[Example], programs: Programs) -> str:
    """What to say where the rows' own answers do not pass their tests; nothing where they do."""
    outcomes = programs.run([program(example, example.output) for example in examples])
    failed = [
        (example, outcome)
        for example, outcome in zip(examples, outcomes, strict=True)
        if not outcome.passed
    ]
    if not failed:
        return ""
    example, outcome = failed[0]
    return (
        f"{name}: the right answers of {len(failed)} of {len(examples)} rows do not pass the rows' "
        f"own tests, so no model can be seen to be right there; the first is {example.source}: "
        f"{outcome.reason[:200]}"
    )
