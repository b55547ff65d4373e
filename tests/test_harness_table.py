"""Benchmark results compared: paired differences by hand, and their lines."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("lm_eval")

from lm_eval.api.metrics import mean
from lm_eval.api.model import LM

from bench_files import sglue_rte, write_jsonl
from manylora.evaluate.harness.offline import load_tasks
from manylora.evaluate.harness.run import score, set_shots
from manylora.evaluate.harness.scoring import differences, group_intervals, task_differences
from manylora.evaluate.harness.table import benchmark_lines, print_benchmarks


def test_a_paired_interval_knows_that_the_questions_are_the_same() -> None:
    """40 hard questions and 40 easy ones, of which the adapter answers 8 more and loses none."""
    base = [0.0] * 40 + [1.0] * 40
    mine = [1.0] * 8 + base[8:]
    gain, low, high = task_differences({"acc": mine}, {"acc": base}, {"acc": mean})["acc"]
    assert gain == pytest.approx(0.1)
    # Normal approximation: 8 of 80 ones, 0.1 +- 1.96 * sqrt(0.1 * 0.9 / 80); unpaired it is 0.15.
    assert low == pytest.approx(0.034, abs=0.02) and high == pytest.approx(0.166, abs=0.02)


def test_what_is_no_mean_is_drawn_in_pairs() -> None:
    def largest(items: list[Any]) -> float:
        return float(max(value for value, _ in items))

    rng = np.random.default_rng(1)
    base = [(float(value), 0) for value in rng.normal(size=30)]
    mine = [(value + 2.0, 0) for value, _ in base]
    found = task_differences({"f1": mine}, {"f1": base}, {"f1": largest})["f1"]
    assert found == pytest.approx([2.0, 2.0, 2.0])


def test_differences_leave_out_what_is_no_number() -> None:
    mine, base = {"acc": [1.0, 0.0], "f1": [(1, 2)]}, {"acc": [0, 0], "f1": [(1, 1)]}
    assert differences(mine, base) == {"acc": [1.0, 0.0]}
    assert group_intervals([{"acc": [1.0, 0.0]}, {"acc": [1.0, 1.0]}])["metrics"]["acc"][0] == 0.75


def entry(name: str, score: float, **more: Any) -> dict[str, Any]:
    metrics = {"acc": [score, score - 0.1, score + 0.1]}
    return {"name": name, "n": 40, "shots": 0, "metrics": metrics, **more}


def results(members: int, **more: Any) -> dict[str, Any]:
    names = [f"t{i}" for i in range(members)]
    part = {"metrics": {"acc": [0.5, 0.4, 0.6]}, "mean_of_tasks": {"acc": [0.5, 0.4, 0.6]}}
    group = {**entry("g", 0.5, tasks=names), "mean_of_tasks": part["mean_of_tasks"]}
    group |= dict.fromkeys(more, part)
    tasks = {name: entry(name, 0.5, **more) for name in names}
    return {"tasks": {**tasks, "alone": entry("alone", 0.9)}, "groups": {"g": group}}


def test_where_less_is_better_more_is_worse() -> None:
    part: dict[str, Any] = {"base": {"metrics": {"acc": [0.3, 0.2, 0.4]}}}
    part["difference"] = {"metrics": {"acc": [0.2, 0.1, 0.3]}}
    for lower, said in (([], "better"), (["acc"], "worse")):
        (line, _) = benchmark_lines(
            {"tasks": {"t": entry("t", 0.5, lower_is_better=lower, **part), "u": entry("u", 0.1)},
             "groups": {}}
        )  # fmt: skip
        assert line.verdict == said


def test_of_a_large_group_the_group_alone_is_shown() -> None:
    shown = [(line.benchmark, line.title) for line in benchmark_lines(results(11))]
    assert shown == [("g", "acc"), ("g", "acc, mean of 11 tasks"), ("alone", "acc")]
    assert len(benchmark_lines(results(10))) == 13


@pytest.mark.parametrize(
    ("difference", "said"),
    [([0.2, 0.1, 0.3], "better"), ([-0.2, -0.3, -0.1], "worse"), ([0.1, -0.1, 0.3], "")],
)
def test_the_base_model_gets_columns_where_it_was_measured(
    difference: list[float], said: str
) -> None:
    part = {"base": {"metrics": {"acc": [0.3, 0.2, 0.4]}}}
    part["difference"] = {"metrics": {"acc": difference}}
    found = results(1, **part)
    line = next(line for line in benchmark_lines(found) if line.benchmark == "t0")
    assert (line.base, line.difference, line.verdict) == ([0.3, 0.2, 0.4], difference, said)
    console = Console(file=io.StringIO(), width=80)
    print_benchmarks(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (text,) = [row for row in text.splitlines() if "t0 0-shot" in row]
    assert f"{difference[0]:+.3f}  {difference[1]:+.3f} to {difference[2]:+.3f}" in text
    assert text.strip().endswith(said or f"{difference[2]:+.3f}")
    console = Console(file=io.StringIO(), width=80)
    print_benchmarks(results(1), console)
    assert "difference" not in console.file.getvalue()  # type: ignore[attr-defined]


class Asked(LM):
    """Says yes to everything, and keeps what it was asked each time."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[Any] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.times.append([request.args for request in requests])
        return [(0.0, True) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


def test_the_base_model_is_shown_the_same_examples(tmp_path: Path) -> None:
    """lm-eval draws them anew for each measurement."""
    write_jsonl(tmp_path / "superglue/RTE/val.jsonl", [sglue_rte(i)[0] for i in range(4)])
    write_jsonl(tmp_path / "superglue/RTE/train.jsonl", [sglue_rte(i)[0] for i in range(50, 70)])
    quiet, lm = Console(file=io.StringIO()), Asked()
    found = load_tasks(["sglue_rte"], tmp_path, allow_code=False)
    set_shots(found, 3, quiet)
    (entry,) = score(lm, found, None, quiet, nullcontext())["tasks"].values()
    with_adapter, without = lm.times
    assert with_adapter == without
    assert with_adapter[0][0].count("men sat.") == 4
    assert entry["difference"]["metrics"]["acc"] == [0.0, 0.0, 0.0]
