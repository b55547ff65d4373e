"""benchmarks/research.py: the data it makes, and that its differences follow from the kept rows."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from manylora.comparison.rows import SCHEMA
from manylora.comparison.store import CellStore
from tiny_multitask import write_multitask

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def research(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("research")


def kept_by(research: ModuleType) -> ModuleType:
    return importlib.import_module(research.keep.__module__)


@pytest.fixture
def multitask(tmp_path: Path) -> Path:
    return write_multitask(tmp_path / "multitask", train=500, test=7)


def written(folder: Path, split: str, task: str) -> list[dict[str, str]]:
    lines = (folder / split / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_task_trains_on_400_rows_drawn_by_what_they_are(
    research: ModuleType, multitask: Path, tmp_path: Path
) -> None:
    part = research.Part(("lora",), "lora:r=1", 1, tasks=("sums",))
    research.write_data(multitask, tmp_path / "one", part)
    rows = written(tmp_path / "one", "train", "sums")
    assert len(rows) == 400 and len(written(tmp_path / "one", "test", "sums")) == 7
    assert not (tmp_path / "one" / "train" / "names.jsonl").exists()
    # The order of the file changes nothing but the order.
    file = multitask / "train" / "sums.jsonl"
    file.write_text("\n".join(reversed(file.read_text().splitlines())), encoding="utf-8")
    research.write_data(multitask, tmp_path / "two", part)
    assert written(tmp_path / "two", "train", "sums") == rows[::-1]


@pytest.mark.parametrize(
    ("reading", "train", "test"),
    [
        ("as_is", {"do sums"}, {"do sums"}),
        ("paraphrased", {"sums A", "sums B"}, {"sums C"}),
        ("input_only", None, None),
    ],
)
def test_a_reading_changes_what_is_asked_and_nothing_else(
    research: ModuleType,
    multitask: Path,
    tmp_path: Path,
    reading: str,
    train: set[str] | None,
    test: set[str] | None,
) -> None:
    part = research.Part(("lora",), "lora:r=1", 1, reading=reading)
    research.write_data(multitask, tmp_path / "data", part)
    for split, wanted in (("train", train), ("test", test)):
        rows = written(tmp_path / "data", split, "sums")
        if wanted is not None:
            assert {row["instruction"] for row in rows} == wanted
            assert {row["input"] for row in rows[1:]} >= {f"{split} 5"}
        else:
            asked = {row["instruction"] for row in rows}
            assert "do sums" in asked  # the row without an input
            assert all(one == "do sums" or one.startswith(split) for one in asked)
            assert not any(row["input"] for row in rows)


def test_a_task_that_is_left_out_is_scored_and_not_trained_on(
    research: ModuleType, multitask: Path, tmp_path: Path
) -> None:
    part = research.Part(("lora",), "lora:r=1", 1, left_out=("names",))
    research.write_data(multitask, tmp_path / "data", part)
    found = {str(file.relative_to(tmp_path / "data")) for file in tmp_path.glob("data/*/*")}
    assert found == {"train/sums.jsonl", "test/sums.jsonl", "unseen/names.jsonl"}
    assert len(written(tmp_path / "data", "unseen", "names")) == 7


def finish(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A part's folder with the runs of the rows, finished."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    for run in pc.unique(table["run"]).to_pylist():
        own = table.filter(pc.equal(table["run"], run))
        CellStore(folder).write(
            run, own.select(["method", "stage", "lr", "seed"])[:1].to_pylist()[0], own
        )


def test_examples_count_alike_and_small_tasks_do_not_count(
    research: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 examples of 1 token and 100 of 9, B is 0.2 and 0 nats a token better: 0.1 in all. Of
    C a run is missing, so it has no difference yet."""
    rows = []
    for method, better, seeds in (("A", 0.0, 3), ("B", 0.2, 3), ("C", 0.2, 2)):
        for seed in range(seeds):
            for task, count in (("large", 200), ("small", 40)):
                for i in range(count):
                    tokens = 1 if i < 100 else 9
                    noise = np.random.default_rng(i).normal() * 0.01
                    nats = 2 + noise - (better if i < 100 or task == "small" else 0)
                    row = (f"{method}{seed}", method, 1, 1e-3, seed, "test", task, f"{task}{i}")
                    rows.append(
                        dict(zip(SCHEMA.names, (*row, tokens, nats * tokens, True), strict=True))
                    )
    part = research.Part(("A", "B", "C"), "lora:r=1", 1)
    monkeypatch.setitem(research.PARTS, "2-oracle-4", part)
    finish(tmp_path / "runs" / "2-oracle-4", rows)
    for _ in range(2):  # what is kept twice is there once
        assert research.keep("2-oracle-4", tmp_path / "runs", tmp_path, "abc1234") == 8
    kept = pq.read_table(tmp_path / "research.parquet")
    assert kept.num_rows == len(rows)
    assert set(kept.column_names) == {*SCHEMA.names, "part", "reading", "epochs"}
    whole = kept.filter(pc.not_equal(kept["method"], "C"))
    assert [task.task for task in kept_by(research).counted(whole).tasks] == ["large"]
    line, *others = research.shown(tmp_path).splitlines()[2:]
    assert line.startswith("| 2-oracle-4 | trained on | B | -0.100 (") and "| yes |" in line
    assert not any("| C |" in other for other in others)


def test_branches_are_held_to_every_lora_of_their_part_on_left_out_tasks_too(
    research: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nats a token: LoRA 2, the other LoRA 1.9, branches 1.8; on the left-out task 0.5 more each,
    but the branches' 1 more."""
    nats = {"lora": 2.0, "lora:use_rslora=true": 1.9, "branches": 1.8}
    rows = []
    for method, seed in itertools.product(nats, range(2)):
        for stage, i in itertools.product(("test", "unseen"), range(100)):
            more = 0.0 if stage == "test" else 1.0 if method == "branches" else 0.5
            nll = nats[method] + more + np.random.default_rng(i).normal() * 0.01
            row = (f"{method}{seed}", method, 1, 1e-3, seed, stage, stage, f"{i}", 1, nll, True)
            rows.append(dict(zip(SCHEMA.names, row, strict=True)))
    part = research.Part(
        tuple(nats), "lora:r=1", 1, seeds=2, clusters="found", left_out=("unseen",)
    )
    monkeypatch.setitem(research.PARTS, "5-left-out-1", part)
    finish(tmp_path / "runs" / "5-left-out-1", rows)
    research.keep("5-left-out-1", tmp_path / "runs", tmp_path, "abc1234")
    said = research.shown(tmp_path)
    for which, lora, other in (
        ("trained on", "-0.200", "-0.100"),
        ("left out", "+0.300", "+0.400"),
    ):
        start = f"| 5-left-out-1 | {which} |"
        assert f"{start} branches | {lora} (" in said
        assert f"{start} lora:use_rslora=true | branches | {other} (" in said


def test_seeds_at_a_rate_that_a_later_trial_was_better_than_do_not_count(
    research: ModuleType,
) -> None:
    """A has all seeds at 2, then a better trial at 1, whose seeds count; one diverged. B has no
    trial at all."""
    rows = []
    trials = [("A", 2, 0.5), ("A", 4, math.nan), ("A", 1, 0.4)]
    runs = [(*trial, "rate") for trial in trials]
    runs += [("A", 2, 9.0, "test"), ("A", 1, 3.0, "test"), ("A", 2, 9.0, "unseen")]
    for method, lr, nll, stage in [*runs, ("B", 3, 1.0, "test")]:
        row = (f"{method}{lr}{stage}", method, 1, float(lr), 0, stage, "one", "e", 1, nll, True)
        rows.append(dict(zip(SCHEMA.names, row, strict=True)))
    found = kept_by(research).at_best_rates(pa.Table.from_pylist(rows, schema=SCHEMA))
    assert found["run"].to_pylist() == ["A2rate", "A4rate", "A1rate", "A1test", "B3test"]


def test_the_parts_of_the_page_are_those_that_can_be_run(research: ModuleType) -> None:
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    for name, part in research.PARTS.items():
        assert f"| {name} |" in page or f"| {name}, " in page
        assert f"r = {part.budget.partition(':r=')[2]} with" in page


def test_a_part_runs_from_files_to_kept_rows(
    research: ModuleType,
    multitask: Path,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = ("lora", "branch_per_cluster_shared")
    part = research.Part(methods, "lora:r=4", 1, seeds=1, compile=False)
    monkeypatch.setitem(research.PARTS, "2-oracle-4", part)
    monkeypatch.setattr(research, "MOST_TRAINED", 20)
    research.run("2-oracle-4", multitask, tmp_path / "runs", 1, str(tiny_folder), tmp_path)
    assert research.keep("2-oracle-4", tmp_path / "runs", tmp_path, "abc1234") == 12
    rows = pq.read_table(tmp_path / "research.parquet")
    tried = rows.filter(pc.equal(rows["stage"], "rate"))
    assert len(pc.unique(tried["run"])) == 10  # five rates of each
    scored = rows.filter(pc.equal(rows["stage"], "test"))
    assert scored.num_rows == 2 * 2 * 7
    assert max(rows["params"].to_pylist()) == rows["params"][0].as_py()  # none above the budget
    assert (
        json.loads((tmp_path / "research.json").read_text())["2-oracle-4"]["budget"] == "lora:r=4"
    )


def test_the_lead_in_the_pages_own_metric_follows_from_the_comparisons_rows(
    research: ModuleType,
) -> None:
    scores = kept_by(research).counted(pq.read_table(research.RESULTS / "compare.parquet"))
    found = {one.method: one for one in kept_by(research).differences(scores, "lora", "nll")}
    for page, order in (("research", (1, 0)), ("comparison", (0, 1))):
        text = " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split())
        both = [found["branch_per_cluster"], found["branch_per_cluster_shared"]]
        assert not any(one.separates for one in both)
        words = ["{:.3f} ({:.3f} to {:.3f})".format(*both[i].value) for i in order]
        joint = " and " if page == "research" else " and, shared, "
        assert joint.join(words) in text


def test_the_outcomes_on_the_page_follow_from_the_kept_rows(research: ModuleType) -> None:
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8").splitlines()
    lines = research.shown(research.RESULTS).splitlines()
    assert len(lines) > 3
    assert [line for line in lines if line and line not in page] == []


def test_where_it_stands_says_what_the_tables_say() -> None:
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    stands = page.split("## Where it stands\n")[1].split("## What is measured\n")[0]
    tables = page.split("## Outcomes\n")[1]
    said = re.findall(r"[-+]?[\d.]+ \([-+]?[\d.]+ to [-+]?[\d.]+\)", " ".join(stands.split()))
    assert len(said) > 12
    assert [one for one in said if f"| {one} |" not in tables] == []


def test_no_best_rate_of_stage_5_is_at_the_edge_of_what_was_tried(research: ModuleType) -> None:
    kept = json.loads((research.RESULTS / "research.json").read_text(encoding="utf-8"))
    methods = [one for name in kept if name.startswith("5-") for one in kept[name]["methods"]]
    assert len(methods) == 32
    assert [one["name"] for one in methods if one["at_edge"]] == []


def test_where_prompts_went_is_summed_by_task(research: ModuleType) -> None:
    clusters = importlib.import_module("research_clusters")
    reading = {
        "clusters": {"one": {"sums": 6, "names": 2}, "two": {"names": 2}},
        "test": {"sums": {"one": 3, "two": 1}, "names": {"two": 1, clusters.SHARED: 1}},
        "unseen": {"new": {"one": 1, clusters.SHARED: 3}},
    }
    found = clusters.shares(reading)
    assert found == {"clusters": 2, "pure": 0.8, "own": 0.625, "refused": 0.25, "unseen": 0.75}
    assert clusters.task_of("nli_mnli.jsonl:17") == "nli_mnli"


def test_the_table_of_clusters_follows_from_the_kept_counts(research: ModuleType) -> None:
    clusters = importlib.import_module("research_clusters")
    page = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    kept = json.loads(clusters.RESULT.read_text(encoding="utf-8"))
    assert clusters.shown(kept) in page


def test_the_lengths_on_the_page_follow_from_the_rows(research: ModuleType) -> None:
    lengths = importlib.import_module("research_lengths")
    said = lengths.shown(json.loads(lengths.RESULT.read_text(encoding="utf-8")))
    page = " ".join((ROOT / "docs" / "research.md").read_text(encoding="utf-8").split())
    banking, quoref, left_out, padded = said.splitlines()
    assert banking == "intent_banking77: 605 tokens in the median, 0 rows of at most 512"
    assert "(605 tokens in the median), not one row fitted" in page
    assert quoref == "rc_quoref: 47 of 100 held-out rows at most 512"
    assert "of rc_quoref's 100 held-out rows 47" in page
    assert left_out.startswith("6 of 10,359") and "Now 6 of 10,359 training rows" in page
    assert padded == "188 tokens a row, 541 padded"
    assert "has 188 tokens a row, and 541 when padded" in page


def scored(
    method: str, seed: int, stage: str, task: str, nats: list[float]
) -> list[dict[str, Any]]:
    run = f"{method}{seed}{stage}"
    return [
        dict(
            zip(
                SCHEMA.names,
                (run, method, 1, 1e-3, seed, stage, task, f"{task}.jsonl:{i}", 2, 2 * nll, True),
                strict=True,
            )
        )
        for i, nll in enumerate(nats)
    ]


def test_a_part_is_shown_against_another_parts_reference_when_its_runs_are_all_there(
    research: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = research.Part(("lora", "B"), "lora:r=1", 1, seeds=2)
    second = research.Part(("C",), "lora:r=1", 1, seeds=2, against="3-clusters-as_is")
    monkeypatch.setitem(research.PARTS, "3-clusters-as_is", first)
    monkeypatch.setitem(research.PARTS, "4-half", second)
    runs, nats = tmp_path / "runs", {"lora": 2.0, "B": 1.9, "C": 1.7}
    for name, methods in (("3-clusters-as_is", ("lora", "B")), ("4-half", ("C",))):
        for seed in range(2):
            for method in methods:
                noise = np.random.default_rng(0).normal(size=100) * 0.01
                finish(runs / name, scored(method, seed, "test", "t", list(nats[method] + noise)))
            research.keep(name, runs, tmp_path, "abc1234")
            if not seed:
                assert f"| {name}" not in research.shown(tmp_path)
    lines = research.shown(tmp_path).splitlines()
    assert lines[2].startswith("| 3-clusters-as_is | trained on | B | -0.100 (")
    assert lines[3].startswith("| 4-half | trained on | C | -0.300 (")


def test_a_difference_is_shown_without_the_task_that_makes_most_of_it(
    research: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of -0.3, -0.1 and -0.1 in three tasks the mean is -0.167, and -0.1 without the first."""
    monkeypatch.setitem(research.PARTS, "4-half", research.Part(("A", "B"), "lora:r=1", 1, seeds=1))
    for task, gap in (("large", 0.3), ("one", 0.1), ("two", 0.1)):
        for method, nats in (("A", 2.0), ("B", 2.0 - gap)):
            rows = scored(method, 0, "test", task, [nats + i / 1000 for i in range(100)])
            for row in rows:
                row["run"] = method
            finish(tmp_path / "part" / task, rows)
    tables = [
        CellStore(tmp_path / "part" / task).rows([method])
        for method in "AB"
        for task in ("large", "one", "two")
    ]
    for method, own in (("A", tables[:3]), ("B", tables[3:])):
        summary = {"method": method, "stage": "test", "lr": 1e-3, "seed": 0}
        CellStore(tmp_path / "runs" / "4-half").write(method, summary, pa.concat_tables(own))
    research.keep("4-half", tmp_path / "runs", tmp_path, "abc1234")
    lines = research.shown(tmp_path).splitlines()
    assert lines[2].startswith("| 4-half | trained on | B | -0.167 (")
    assert lines[6].startswith("| 4-half | trained on | B | large | -0.100 (")


def test_kept_runs_are_put_back_where_a_comparison_finds_them(
    research: ModuleType, tmp_path: Path
) -> None:
    rows = scored("lora", 0, "rate", "t", [1.0, 2.0]) + scored("lora", 0, "test", "t", [3.0])
    finish(tmp_path / "runs" / "2-oracle-26", rows)
    research.keep("2-oracle-26", tmp_path / "runs", tmp_path, "abc1234")
    research.restore("2-oracle-26", tmp_path / "new", tmp_path)
    before, after = (CellStore(tmp_path / name / "2-oracle-26") for name in ("runs", "new"))
    for run in ("lora0rate", "lora0test"):
        assert after.summary(run) == before.summary(run) is not None
        assert after.rows([run]).equals(before.rows([run]))
    research.restore("4-half", tmp_path / "new", tmp_path)  # nothing is kept of it
    assert not (tmp_path / "new" / "4-half").exists()


@pytest.mark.parametrize(
    ("need", "total", "ranks"),
    [
        ([1, 1, 1], 6, [2, 2, 2]),
        ([4, 1, 1], 9, [6, 2, 1]),
        ([100, 1, 0], 6, [4, 1, 1]),  # each has one
        ([0, 0], 4, [2, 2]),
        ([-1.0, 2.0], 4, [1, 3]),
    ],
)
def test_rank_is_shared_out_by_need(
    research: ModuleType, need: list[float], total: int, ranks: list[int]
) -> None:
    assert importlib.import_module("research_ranks").shared_out(need, total) == ranks


def test_needs_are_read_from_the_kept_trials_by_cluster(
    research: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clusters a and b LoRA is left with 1 and 3 nats a token; an own branch gains 0.5 and 0."""
    ranks = importlib.import_module("research_ranks")
    rows = []
    for method, a in (("lora", 1.0), (ranks.SHARED, 0.5)):
        rows += scored(method, 0, "rate", "x", [a, 3.0])
        rows += scored(method, 1, "rate", "x", [9.0, 9.0])  # a worse rate
    finish(tmp_path / "runs" / "3-clusters-as_is", rows)
    research.keep("3-clusters-as_is", tmp_path / "runs", tmp_path, "abc1234")
    clusters = {"a": (30, ["x.jsonl:0"]), "b": (10, ["x.jsonl:1"])}
    monkeypatch.setattr(ranks, "_clusters", lambda recipe: clusters)
    names = tuple(f"{ranks.SHARED}:r=4:branch_ranks={need}" for need in ranks.NEEDS)
    part = research.Part(("lora", *names), "lora:r=1", 1, against="3-clusters-as_is")
    found = ranks.with_ranks(part, None, tmp_path / "research.parquet")
    assert list(found.values()) == [
        "lora",
        *(f"{ranks.SHARED}:r=4:branch_ranks={own}" for own in ("6+2", "2+6", "7+1")),
    ]
    assert ranks.with_ranks(research.Part(("lora",), "", 1), None, tmp_path / "none") == {
        "lora": "lora"
    }
