"""The part of a run's page about its benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_report import EVIL, Outline, page, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path, steps=4)
    return tmp_path


def benchmarks(compared: bool) -> dict[str, Any]:
    def part(mean: float) -> dict[str, Any]:
        return {"metrics": {"acc": [mean, mean - 0.02, mean + 0.03]}}

    names = ["boolq", EVIL, *(f"part{i}" for i in range(11))]
    tasks = {
        name: {"name": name, "n": 40, "documents": 3270, "shots": 0, **part(0.7 - i / 50)}
        for i, name in enumerate(names)
    }
    group = {"name": "whole", "n": 440, "documents": 440, "shots": [0, 5], "tasks": names[2:]}
    group |= part(0.55) | {"mean_of_tasks": {"acc": [0.56, 0.5, 0.6]}}
    tasks["boolq"]["official_documents"] = 3270
    if compared:
        tasks["boolq"] |= {"base": part(0.617), "difference": part(0.083)}
    return {"versions": {"lm_eval": "0.4.13"}, "tasks": tasks, "groups": {"whole": group}}


@pytest.mark.parametrize("compared", [True, False])
def test_page_shows_benchmarks_where_the_run_has_them(run: Path, compared: bool) -> None:
    assert 'id="benchmarks"' not in page(run)
    (run / "benchmarks.json").write_text(json.dumps(benchmarks(compared)))
    text = page(run)
    assert Outline(text).ids[:4] == ["findings", "scores", "benchmarks", "training"]
    section = text.split('id="benchmarks"')[1].split("</section>")[0]
    assert "boolq<small>acc; 0-shot, 40 of 3,270 documents</small>" in section
    assert "whole<small>acc, mean of 11 tasks; 0–5-shot, 440 documents</small>" in section
    assert "0.700<small>0.680–0.730</small>" in section
    assert "part3" not in section and "<script" not in section
    assert ("0.617" in section) is compared
    assert ('<b class="better">+0.083 ▲</b>' in section) is compared
    assert ("--base</code> adds the base model" in section) is not compared


def test_a_benchmarks_file_in_another_form_is_refused(run: Path) -> None:
    found = benchmarks(True)
    del found["tasks"]["boolq"]["metrics"]
    (run / "benchmarks.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"benchmarks.json: tasks.boolq.metrics: .*eval RUN"):
        page(run)
