"""docs/discovery.md has the tables of the kept results, and those follow from the kept rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ("discovery", "discovery_fresh", "discovery_2000_tfidf", "discovery_2000_model")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "kept_discovery", ROOT / "benchmarks/discovery.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def draws(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["draws"]
    return found


@pytest.mark.parametrize("name", KEPT)
def test_the_page_has_the_table_of_the_kept_result(name: str, benchmark: ModuleType) -> None:
    page = (ROOT / "docs" / "discovery.md").read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{benchmark.markdown(draws(name))}\n" in page


@pytest.mark.parametrize("name", KEPT)
def test_the_kept_figures_follow_from_the_assignment_of_each_document(name: str) -> None:
    table = pa.concat_tables(
        pq.read_table(file)
        for file in (RESULTS / f"{name}.parquet", RESULTS / f"{name}_others.parquet")
        if file.is_file()
    )
    assert table.column_names == ["draw", "reading", "seed", "task", "cluster"]
    for draw in draws(name):
        own = table.filter(
            pc.and_(
                pc.equal(table["draw"], draw["draw"]), pc.equal(table["reading"], draw["reading"])
            )
        )
        assert own.num_rows == draw["documents"]
        clusters = own["cluster"].to_pylist()
        assert len(set(clusters) - {-1}) == draw["k"]
        if draw["ari"] is not None:
            ari = adjusted_rand_score(own["task"].to_pylist(), clusters)
            assert ari == pytest.approx(draw["ari"])
