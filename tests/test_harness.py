"""The papers' benchmarks from files: lm-eval's own prompts, right scores, and clear refusals."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import binomtest

pytest.importorskip("lm_eval")

from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from bench_files import hub_rows, mmlu, sglue_rte, write_bench, write_csv, write_jsonl
from manylora.corpus import CorpusError
from manylora.evaluate.harness.offline import FOLDERS, GROUPS, Benchmarks, load_tasks
from manylora.evaluate.harness.run import evaluate_benchmarks, score, set_shots

COUNT = 40
QUIET = Console(file=io.StringIO())
TASKS_FOLDER = Path(__import__("lm_eval").__path__[0]) / "tasks"
SINGLE = ["mmlu_anatomy", "gsm8k_cot", "bbh_cot_fewshot_navigate", "bbh_fewshot_navigate",
          *GROUPS["super_glue"]]  # fmt: skip
CHANCE = {"mmlu_anatomy": 1 / 4, "cb": 1 / 3, "gsm8k_cot": 1 / 10}  # others 1/2


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    paths = [TASKS_FOLDER / folder for folder in FOLDERS]
    return TaskManager(include_defaults=False, include_path=paths)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subjects = ["anatomy", *(name.removeprefix("mmlu_") for name in GROUPS["mmlu_medical"])]
    folder = tmp_path_factory.mktemp("bench")
    return write_bench(folder, COUNT, subjects, ["navigate", "word_sorting"])


class Fake(LM):
    """Answers each request rightly, or at random: the one or the other of what could be meant."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.random = None if seed is None else random.Random(seed)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        if self.random:
            return [(self.random.random(), True) for _ in requests]
        return [(0.0 if self.says(r) else -1.0, True) for r in requests]

    def says(self, request: Any) -> bool:
        doc, text = request.doc, request.args[1]
        if request.task_name == "multirc":
            return text.endswith("? yes") == (doc["label"] == 1)
        return request.idx == doc["answer" if request.task_name.startswith("mmlu") else "label"]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.writes(request.task_name, request.doc) for request in requests]

    def writes(self, task: str, doc: dict[str, Any]) -> str:
        if task == "humaneval":
            right = self.random is None or self.random.random() < 0.5
            return str(doc["canonical_solution"]) if right else "    return None\n"
        if task == "gsm8k_cot":
            number = str(self.random.randrange(10)) if self.random else doc["answer"][-1]
            return f" We add. The answer is {number}.\n"
        answer = self.random.choice(["Yes", "No"]) if self.random else doc["target"]
        return f"So the answer is {answer}." if task.startswith("bbh_cot") else f" {answer}"

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def scored(lm: LM, names: list[str], bench: Path, shots: int | None = None) -> dict[str, Any]:
    found = load_tasks(names, bench, allow_code=True)
    set_shots(found, shots, QUIET)
    return score(lm, found, None, QUIET)


def only(results: dict[str, Any]) -> list[float]:
    """The main metric of the one task that was run."""
    (entry,) = results["tasks"].values()
    return list(next(iter(entry["metrics"].values())))


@pytest.mark.parametrize("name", [*SINGLE, "humaneval"])
def test_a_model_that_answers_rightly_scores_everything(name: str, bench: Path) -> None:
    (entry,) = scored(Fake(), [name], bench)["tasks"].values()
    rows = 12 if name == "humaneval" else 2 * COUNT if name == "multirc" else COUNT
    assert entry["n"] == entry["documents"] == rows
    assert entry["metrics"], name
    for metric, found in entry["metrics"].items():
        assert found == [1.0, 1.0, 1.0], metric


@pytest.mark.parametrize("name", [*SINGLE, "humaneval"])
def test_a_model_that_guesses_scores_chance(name: str, bench: Path) -> None:
    results = scored(Fake(seed=7), [name], bench)
    mean, low, high = only(results)
    rows = len({example["row"] for example in results["examples"]})
    right = round(mean * rows)
    assert low < mean < high
    assert binomtest(right, rows, CHANCE.get(name, 1 / 2)).pvalue > 0.01
    values = [e["value"] for e in results["examples"] if e["metric"] != "f1"]
    assert sum(values[:rows]) == right or name == "gsm8k_cot"


@pytest.mark.parametrize("shots", [0, None, 5])
@pytest.mark.parametrize("name", SINGLE)
def test_prompts_are_lm_evals_own(
    name: str, shots: int | None, bench: Path, manager: TaskManager, tmp_path: Path
) -> None:
    """The same rows, as the hub has them, in lm-eval's task as installed."""
    test = "test" if name.startswith(("mmlu", "gsm8k", "bbh")) else "validation"
    files = {test: tmp_path / "rows.jsonl"}
    write_jsonl(files[test], hub_rows(name, COUNT))
    for split in ("dev",) if name.startswith("mmlu") else ("train",) if test != "test" else ():
        files[split] = tmp_path / f"{split}.jsonl"
        write_jsonl(files[split], [mmlu(i)[1] for i in range(90, 95)] if split == "dev"
                    else hub_rows(name, 1))  # fmt: skip
    data = {"data_files": {k: str(v) for k, v in files.items()}, "cache_dir": str(tmp_path / "hf")}
    override = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    group: dict[str, Any] = {"group": "theirs", "task": [{"task": name, **override}]}
    theirs: Any = manager.load([group])["tasks"][name]
    ours = load_tasks([name], bench, allow_code=False).tasks[name]
    shown = (ours.config.num_fewshot or 0) if shots is None else shots
    if shots == 5 and not name.startswith(("mmlu", "gsm8k")):
        with pytest.raises(ValueError, match="5 examples to show were asked for, and there are"):
            set_shots(Benchmarks({name: ours}, {}), shots, QUIET)
        return
    docs = list(zip(ours.eval_docs, theirs.eval_docs, strict=True))
    assert len(docs) == len(hub_rows(name, COUNT))
    for mine, other in docs:
        assert ours.fewshot_context(mine, shown) == theirs.fewshot_context(other, shown)
        if ours.config.doc_to_choice is not None:
            expected = theirs.doc_to_choice(other)
            if name == "multirc":  # whose two answers lm-eval has in the wrong order
                expected = expected[::-1]
            assert ours.doc_to_choice(mine) == expected
        assert ours.doc_to_target(mine) == theirs.doc_to_target(other)
    assert shown == 0 or "\n\n" in ours.fewshot_context(docs[0][0], shown)


def test_examples_drawn_from_train_rows_are_those_that_lm_eval_draws(
    manager: TaskManager, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "superglue/RTE/val.jsonl", [sglue_rte(i)[0] for i in range(4)])
    write_jsonl(tmp_path / "superglue/RTE/train.jsonl", [sglue_rte(i)[0] for i in range(50, 70)])
    write_jsonl(tmp_path / "hub.jsonl", [sglue_rte(i)[1] for i in range(4)])
    write_jsonl(tmp_path / "hub_train.jsonl", [sglue_rte(i)[1] for i in range(50, 70)])
    files = {"validation": str(tmp_path / "hub.jsonl"), "train": str(tmp_path / "hub_train.jsonl")}
    data = {"data_files": files, "cache_dir": str(tmp_path / "hf")}
    override = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    group: dict[str, Any] = {"group": "theirs", "task": [{"task": "sglue_rte", **override}]}
    theirs: Any = manager.load([group])["tasks"]["sglue_rte"]
    theirs.set_fewshot_seed(seed=1234)
    found = load_tasks(["sglue_rte"], tmp_path, allow_code=False)
    set_shots(found, 3, QUIET)
    ours = found.tasks["sglue_rte"]
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        shown = ours.fewshot_context(mine, 3)
        assert shown == theirs.fewshot_context(other, 3)
        assert shown.count("men sat.") == 4


def test_humaneval_shows_the_head_of_the_function_alone(bench: Path) -> None:
    task = load_tasks(["humaneval"], bench, allow_code=False).tasks["humaneval"]
    assert [task.fewshot_context(doc, 0) for doc in task.eval_docs] == [
        row["prompt"] for row in hub_rows("humaneval", 12)
    ]
    assert task.config.generation_kwargs["do_sample"] is False


def test_ten_programs_a_problem_are_drawn_and_give_pass_at_1_and_10(bench: Path) -> None:
    found = load_tasks(["humaneval"], bench, samples=10, allow_code=True)
    assert found.tasks["humaneval"].config.generation_kwargs["temperature"] == 0.2
    set_shots(found, None, QUIET)
    (entry,) = score(Fake(seed=1), found, 3, QUIET)["tasks"].values()
    assert entry["n"] == 3
    assert 0.2 < entry["metrics"]["pass@1"][0] < 0.8
    assert entry["metrics"]["pass@10"][0] == 1.0


def test_groups_pool_their_tasks_and_average_them(bench: Path) -> None:
    results = scored(Fake(seed=3), ["mmlu_medical", "super_glue"], bench, shots=0)
    group = results["groups"]["super_glue_0shot"]
    means = [e["metrics"]["acc"][0] for e in results["tasks"].values() if "mmlu" not in e["name"]]
    assert group["tasks"] == GROUPS["super_glue"] and len(means) == 6
    assert group["n"] == 7 * COUNT
    mean, low, high = group["mean_of_tasks"]["acc"]
    assert mean == pytest.approx(sum(means) / 6)
    assert low < mean < high < low + 0.2
    right = [e["value"] for e in results["examples"]
             if e["metric"] == "acc" and e["task"] in group["tasks"]]  # fmt: skip
    assert group["metrics"]["acc"][0] == pytest.approx(sum(right) / len(right))
    assert "f1" not in group["metrics"]
    assert results["groups"]["mmlu_medical_0shot"]["n"] == 3 * COUNT


def test_lm_evals_groups_name_the_same_tasks(bench: Path, manager: TaskManager) -> None:
    with pytest.raises(CorpusError, match=r"mmlu/test/abstract_algebra_test.csv: no such file"):
        load_tasks(["mmlu"], bench, allow_code=False)
    with pytest.raises(CorpusError, match=r"bbh/bbh/boolean_expressions.json: no such file"):
        load_tasks(["bbh"], bench, allow_code=False)
    assert set(GROUPS["mmlu_medical"] + GROUPS["mmlu_law"]) <= set(manager.all_subtasks)


BROKEN = {
    "gsm8k/test.jsonl": ("gsm8k_cot", '{"question": "a"}\n', "row 1: no field 'answer'"),
    "superglue/CB/val.jsonl": (
        "cb",
        '{"premise": "a", "hypothesis": "b", "label": "maybe"}\n',
        "row 1: the label is 'maybe'; expected entailment or",
    ),
    "superglue/COPA/val.jsonl": ("copa", "not json\n", "row 1: not JSON"),
    "superglue/BoolQ/val.jsonl": (
        "boolq",
        '{"question": "a", "passage": "b", "label": "True"}\n',
        "row 1: 'label' is 'True'; expected a value of type bool",
    ),
    "bbh/bbh/navigate.json": ("bbh_fewshot_navigate", '{"data": []}', "no field 'examples'"),
    "superglue/RTE/val.jsonl": ("sglue_rte", "", "the file has no rows"),
    "superglue/MultiRC/val.jsonl": (
        "multirc",
        '{"idx": 0, "passage": {"text": "t", "questions": [{"question": "q"}]}}\n',
        "row 1, question 0: no field 'answers'",
    ),
}


@pytest.mark.parametrize("path", BROKEN)
def test_a_file_in_another_form_is_refused_by_file_and_row(path: str, tmp_path: Path) -> None:
    task, text, message = BROKEN[path]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError) as caught:
        load_tasks([task], tmp_path, allow_code=False)
    assert path in str(caught.value) and message in str(caught.value)


def test_a_changed_mmlu_file_is_refused(tmp_path: Path) -> None:
    rows = [mmlu(0)[0], {**mmlu(1)[0], "answer": "B"}]
    write_csv(tmp_path / "mmlu/test/anatomy_test.csv", rows)
    with pytest.raises(CorpusError, match=r"anatomy_test.csv, row 2: .*answer='B'"):
        load_tasks(["mmlu_anatomy"], tmp_path, allow_code=False)


def test_unknown_names_are_refused_with_the_nearest(bench: Path) -> None:
    with pytest.raises(ValueError, match=r"no benchmark 'boolqq'.*Did you mean boolq"):
        load_tasks(["boolqq"], bench, allow_code=False)
    with pytest.raises(CorpusError, match="no files of aps/super_glue"):
        load_tasks(["wic"], bench, allow_code=False)


def test_gsm8k_without_train_rows_says_where_they_go(bench: Path) -> None:
    found = load_tasks(["gsm8k"], bench, allow_code=False)
    with pytest.raises(ValueError, match=r"5 examples .* there are 0.*train.jsonl"):
        set_shots(found, None, QUIET)


def test_programs_are_run_only_when_the_user_says_so(bench: Path) -> None:
    with pytest.raises(ValueError, match="pass --allow-code"):
        evaluate_benchmarks(Path("nowhere"), ["humaneval"], QUIET, data_dir=bench)


def test_a_part_of_a_benchmark_is_called_one(bench: Path) -> None:
    told = Console(file=io.StringIO(), width=200)
    found = load_tasks(["boolq"], bench, allow_code=False)
    set_shots(found, None, told)
    entry = score(Fake(), found, 4, told)["tasks"]["boolq_0shot"]
    assert (entry["n"], entry["documents"], entry["official_documents"]) == (4, COUNT, 3270)
    assert "boolq: 4 documents; the benchmark has 3,270" in told.file.getvalue()  # type: ignore[attr-defined]
    assert json.dumps(entry)


def test_without_lm_eval_it_is_said_how_to_get_it(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.evaluate.harness.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'manylora\[eval\]'"):
        evaluate_benchmarks(Path("nowhere"), ["boolq"], QUIET, data_dir=bench)
