"""lm-eval's tasks by their own names: rows as the hub gives them, scores of the live adapter.

`datasets.load_dataset`, which lm-eval calls for the rows, gives them from memory here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

pytest.importorskip("lm_eval")

import datasets
from datasets import Dataset, DatasetDict

from bench_files import hub_rows, mmlu, write_bench
from manylora.cli.using import evaluate
from manylora.corpus import CorpusError
from manylora.evaluate.harness.offline import load_tasks
from manylora.evaluate.harness.run import evaluate_benchmarks
from manylora.recipe import Recipe
from manylora.report.page import write_report
from manylora.train import train

COUNT = 6
QUIET = Console(file=io.StringIO(), width=200)
TASKS = {
    ("aps/super_glue", "boolq"): "boolq",
    ("aps/super_glue", "cb"): "cb",
    ("aps/super_glue", "copa"): "copa",
    ("aps/super_glue", "multirc"): "multirc",
    ("aps/super_glue", "rte"): "sglue_rte",
    ("aps/super_glue", "wsc.fixed"): "wsc",
    ("openai/gsm8k", "main"): "gsm8k_cot",
    ("cais/mmlu", "anatomy"): "mmlu_anatomy",
    ("SaylorTwift/bbh", "navigate"): "bbh_fewshot_navigate",
    ("openai/openai_humaneval", None): "humaneval",
}
Asked = list[tuple[str, str | None]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The data sets that were asked for; arc_easy has rows of its own."""
    asked: Asked = []

    def load(path: str, name: str | None = None, **_: Any) -> DatasetDict:
        asked.append((path, name))
        if path == "allenai/ai2_arc":
            choices = {"text": ["2", "3", "4", "5"], "label": list("ABCD")}
            row = {"question": "1 + 1?", "choices": choices, "answerKey": "A", "id": "x"}
            return DatasetDict(
                {s: Dataset.from_list([row] * COUNT) for s in ("train", "validation", "test")}
            )
        rows = Dataset.from_list(hub_rows(TASKS[path, name], COUNT))
        splits = dict.fromkeys(("train", "validation", "test"), rows)
        return DatasetDict(splits | {"dev": Dataset.from_list([mmlu(i)[1] for i in range(90, 95)])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture
def run(make_recipe: Callable[..., Recipe]) -> Path:
    return train(make_recipe(method="branch_per_cluster"), QUIET)


def test_names_of_lm_eval_are_scored_from_the_command_to_the_page(
    run: Path, hub: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(run)
    evaluate(run, tasks="boolq, copa", base=True, batch_size=4)
    assert hub == [("aps/super_glue", "boolq"), ("aps/super_glue", "copa")]
    kept = json.loads((run / "benchmarks.json").read_text(encoding="utf-8"))["tasks"]
    assert list(kept) == ["boolq_0shot", "copa_0shot"]
    rows = pq.read_table(run / "benchmarks.parquet").to_pylist()
    for entry in kept.values():
        own = [row for row in rows if row["task"] == entry["name"] and row["metric"] == "acc"]
        assert len(own) == entry["n"] == COUNT
        for key, part in (("value", entry), ("base_value", entry["base"])):
            mean = sum(row[key] for row in own) / COUNT
            assert part["metrics"]["acc"][0] == pytest.approx(mean)
        difference = entry["metrics"]["acc"][0] - entry["base"]["metrics"]["acc"][0]
        assert entry["difference"]["metrics"]["acc"][0] == pytest.approx(difference)
    printed = capsys.readouterr().out
    assert "boolq" in printed and "difference" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert 'id="benchmarks"' in (run / "report.html").read_text(encoding="utf-8")


def test_rows_of_the_hub_and_of_files_give_the_same_scores(
    run: Path, hub: Asked, tmp_path: Path
) -> None:
    names = ["mmlu_anatomy", "bbh_fewshot_navigate", "super_glue"]
    bench = write_bench(tmp_path / "bench", COUNT, ["anatomy"], ["navigate"])
    from_files = evaluate_benchmarks(run, names, QUIET, data_dir=bench, shots=0)
    assert hub == []
    online = evaluate_benchmarks(run, names, QUIET, shots=0)
    assert len(hub) == 8
    for part in ("tasks", "groups"):
        for name, entry in from_files[part].items():
            assert online[part][name]["metrics"] == entry["metrics"], name
            assert online[part][name]["n"] == entry["n"]
    assert online["examples"] == from_files["examples"]


def test_tasks_that_have_no_files_are_found_by_name(run: Path, hub: Asked) -> None:
    results = evaluate_benchmarks(run, ["arc_easy"], QUIET, limit=3)
    assert hub == [("allenai/ai2_arc", "ARC-Easy")]
    entry = results["tasks"]["arc_easy_0shot"]
    assert entry["n"] == 3 and entry["documents"] == COUNT
    assert set(entry["metrics"]) >= {"acc", "acc_norm"}


def test_humaneval_and_gsm8k_of_the_hub_show_their_own_prompts(hub: Asked) -> None:
    tasks = load_tasks(["humaneval", "gsm8k_cot"], None, allow_code=False).tasks
    doc = tasks["humaneval"].eval_docs[0]
    assert tasks["humaneval"].fewshot_context(doc, 0) == hub_rows("humaneval", 1)[0]["prompt"]
    doc = tasks["gsm8k_cot"].eval_docs[1]
    assert tasks["gsm8k_cot"].fewshot_context(doc, 8).endswith("Q: 1 apples?\nA:")


@pytest.mark.parametrize("name", ["boolq", "humaneval", "mmlu_anatomy"])
def test_without_network_one_sentence_names_the_files(name: str, unreachable: None) -> None:
    with pytest.raises(CorpusError) as caught:
        load_tasks([name], None, allow_code=True)
    said = str(caught.value)
    assert said.startswith(f"{name}: without --data-dir its rows come from the hub")
    assert "ConnectionError: Couldn't reach" in said
    assert "give --data-dir (data_dir=) a folder with files of mmlu" in said
    assert ". " not in said and "\n" not in said
