"""docs/comparison.md and the kept comparison follow from the kept rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from manylora.comparison.intervals import differences, summarise
from manylora.comparison.result import Comparison
from manylora.comparison.rows import SCHEMA, Scores
from manylora.comparison.tables import DIFFERENCE_HEADER, difference_rows, markdown, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def kept() -> Comparison:
    said = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
    del said["commit"]
    return Comparison.model_validate(said)


def test_the_figures_follow_from_the_rows(kept: Comparison) -> None:
    rows = pq.read_table(RESULTS / "compare.parquet")
    assert rows.schema.names == SCHEMA.names
    scores = Scores.of(rows)
    assert summarise(scores) == kept.scores
    found = [d for metric in ("nll", "correct") for d in differences(scores, "lora", metric)]
    assert found == kept.differences


def test_the_rates_follow_from_the_rows(kept: Comparison) -> None:
    rows = pq.read_table(RESULTS / "compare.parquet")
    for info in kept.methods:
        own = rows.filter(pc.equal(rows["method"], info.name))
        stage = own["stage"]
        tried = set(own.filter(pc.equal(stage, "rate"))["lr"].to_pylist())
        assert tried == {point.lr for point in info.rates} and len(tried) == 5
        tested = own.filter(pc.equal(stage, "test"))
        assert set(tested["lr"].to_pylist()) == {info.best_lr}
        assert set(tested["seed"].to_pylist()) == set(range(5))
        assert info.best_lr == min(info.rates, key=lambda point: point.nll).lr


def test_the_page_has_the_tables_of_the_kept_result(kept: Comparison) -> None:
    tables = ROOT / "docs" / "comparison" / "four_tasks.md"
    assert tables.read_text(encoding="utf-8") == markdown(kept)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert table(DIFFERENCE_HEADER, difference_rows(kept)) in page
