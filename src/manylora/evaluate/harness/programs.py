"""HumanEval (arXiv 2107.03374): lm-eval's prompts and stops; the programs run in our sandbox.

lm-eval's own task fetches a metric from the hub when it is built, and runs the programs in a child
process with nothing else to hold them. Here `evaluate/code.py` runs them.

One program a problem is written greedily, as lm-eval's `humaneval` does; more are drawn at
temperature 0.2 and top-p 0.95, as its `humaneval_64` does. pass@k is the paper's unbiased estimate
for k = 1 and 10, where as many programs were written.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from manylora.evaluate.code import humaneval_program, pass_at_k, run_program
from manylora.evaluate.programs import MEMORY_MB, SECONDS, K


def humaneval_config(samples: int, allow_code: bool, manager: Any) -> dict[str, Any]:
    """What is changed of lm-eval's humaneval. allow_code: the user said that programs may run."""
    if samples < 1:
        raise ValueError(f"samples={samples}: give 1 or more")
    drawn = manager.task_index["humaneval_64"].cfg["generation_kwargs"]
    metrics = [f"pass@{k}" for k in K if k <= samples]
    return {
        "repeats": samples,
        "process_results": partial(_score, allow_code=allow_code),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
        "filter_list": [
            {"name": "none", "filter": [{"function": "custom", "filter_fn": _all_of_them}]}
        ],
        **({"generation_kwargs": drawn} if samples > 1 else {}),
    }


def _all_of_them(answers: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    return answers


def _score(doc: dict[str, Any], results: list[list[str]], *, allow_code: bool) -> dict[str, float]:
    """pass@k of one problem from the programs written for it."""
    run = partial(run_program, allow_code=allow_code, seconds=SECONDS, memory_mb=MEMORY_MB)
    programs = [humaneval_program(doc, completion) for completion in results[0]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(run, programs))
    right = sum(outcome.passed for outcome in outcomes)
    return {f"pass@{k}": float(pass_at_k(len(programs), right, k)) for k in K if k <= len(programs)}
