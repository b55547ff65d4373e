"""benchmarks/research_finalists.py: finalists follow from rate trials, and from nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("research_finalists")


def part_of(rule: ModuleType, method: str, reading: str) -> str:
    if method in rule.VARIANTS:
        return "4-variants"
    return f"{'3-clusters' if method == rule.SHARED else '4-fallback'}-{reading}"


def rows_of(rule: ModuleType, best: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Two trials each, the better one as `best` has it, and a held-out row that would win."""
    asked = [(name, "as_is") for name in rule.AS_IS]
    asked += [(name, r) for name in rule.IN_ALL_READINGS for r in rule.READINGS if r != "as_is"]
    rows = []
    for method, reading in asked:
        same = {"part": part_of(rule, method, reading), "reading": reading, "method": method}
        nats = best.get((method, reading), 1.0)
        for lr, stage, value in ((1e-3, "rate", nats), (2e-3, "rate", 2.0), (1e-3, "test", 0.0)):
            # A task of one long row counts as much as one of two short ones.
            for task, tokens, share in (("a", 90, 0.5), ("b", 1, 1.5), ("b", 1, 1.5)):
                own = {"task": task, "tokens": tokens, "nll": tokens * value * share}
                run = f"{method} {reading} {lr} {stage}"
                rows.append({**same, "run": run, "lr": lr, "stage": stage, "correct": True, **own})
    return rows


def test_one_is_best_as_it_is_and_one_over_the_readings(rule: ModuleType, tmp_path: Path) -> None:
    best_as_is, plain, both = rule.VARIANTS[0], rule.SHARED, rule.FALLBACK[1]
    best = {(best_as_is, "as_is"): 0.90, (plain, "as_is"): 0.91, (both, "as_is"): 0.95}
    best |= {(both, "paraphrased"): 0.98, (both, "input_only"): 0.95}
    pq.write_table(pa.Table.from_pylist(rows_of(rule, best)), tmp_path / "rows.parquet")
    assert rule.finalists(tmp_path / "rows.parquet") == (best_as_is, both)


def test_a_trial_that_diverged_is_no_method_s_best(rule: ModuleType, tmp_path: Path) -> None:
    """Of each trial of the method that would otherwise win, one row has no loss."""
    rows = rows_of(rule, {(rule.VARIANTS[0], "as_is"): 0.5, (rule.SHARED, "as_is"): 0.9})
    for row in rows:
        if row["method"] == rule.VARIANTS[0] and row["lr"] == 1e-3 and row["task"] == "a":
            row["nll"] = float("nan")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rule.finalists(tmp_path / "rows.parquet") == (rule.SHARED,)


def test_they_may_be_the_same_one(rule: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(rule, {(rule.SHARED, "as_is"): 0.9})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rule.finalists(tmp_path / "rows.parquet") == (rule.SHARED,)


def test_a_method_without_trials_is_named(rule: ModuleType, tmp_path: Path) -> None:
    rows = [row for row in rows_of(rule, {}) if row["method"] != rule.VARIANTS[0]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(KeyError, match=rule.VARIANTS[0]):
        rule.finalists(tmp_path / "rows.parquet")


def test_the_finalists_that_run_are_those_of_the_rule(rule: ModuleType) -> None:
    named = importlib.import_module("research_parts").FINALISTS
    assert named == rule.finalists(rule.KEPT)


def test_the_trials_on_the_page_are_the_kept_ones(rule: ModuleType) -> None:
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    assert rule.shown(rule.KEPT) in page
    assert rule.shown(rule.KEPT).count(" *") == 2
