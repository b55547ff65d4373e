"""pass@k of a run's own rows that carry tests: run only when asked, counted rightly, kept apart."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manylora.base import load_model, load_tokenizer
from manylora.corpus import Corpus, Encoder, Example
from manylora.evaluate import scores as module
from manylora.evaluate.answers import Sampling, generate_answers
from manylora.evaluate.held_out import evaluate_run
from manylora.evaluate.programs import Programs, code_of, own_answers_that_fail
from manylora.evaluate.scores import HeldOut, held_out, score_tasks, write_scores
from manylora.evaluate.table import print_scores
from manylora.recipe import Recipe
from manylora.train import train
from programs import needs_sandbox

RIGHT, WRONG = "def f(x):\n    return {n} * x", "def f(x):\n    return {n} * x + 1"
ENDLESS = "def f(x):\n    while True: pass"


def row(number: int, answer: str = RIGHT, tests: str = "assert f(2) == 2 * {n}") -> Example:
    messages: Any = [
        {"role": "user", "content": f"Times {number}."},
        {"role": "assistant", "content": answer.format(n=number)},
    ]
    return Example("t", messages, f"t:{number}", tests.format(n=number))


def told() -> Console:
    return Console(file=io.StringIO(), width=200)


def task_of(rows: list[Example], folder: Path) -> HeldOut:
    tokenizer = load_tokenizer(str(folder))
    (task,), _ = held_out(Corpus({"t": rows}, {"t": rows}), Encoder(tokenizer, 400), 99)  # type: ignore[dict-item]
    return task


def scored(
    task: HeldOut,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[str],
    programs: Programs | None,
) -> dict[str, list[float]]:
    """The scores of a model that writes these answers, one after the other, when it writes."""
    tokenizer = load_tokenizer(str(folder))
    asked: list[Sampling | None] = []

    def write(_: object, prompts: list[list[int]], *rest: Any) -> list[list[int]]:
        asked.append(rest[-1])
        texts = answers if len(prompts) == len(answers) else [answers[0]] * len(prompts)
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    monkeypatch.setattr(module, "generate_answers", write)
    found = score_tasks(load_model(str(folder)), tokenizer, [task], ["t"], programs=programs)["t"]
    assert asked[-1] == (programs.sampling if programs else None)
    assert len(asked) == (1 if programs is None or programs.sampling is None else 2)
    return found


@needs_sandbox
def test_a_right_program_passes_and_a_wrong_or_endless_one_fails(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of([row(i) for i in range(1, 5)], tiny_folder)
    answers = [
        f"Here it is:\n```python\n{RIGHT.format(n=1)}\n```\nThat was it.",
        WRONG.format(n=2),
        ENDLESS,
        RIGHT.format(n=4),
    ]
    found = scored(task, tiny_folder, monkeypatch, answers, Programs(seconds=3))
    mean, low, high = found["pass@1"]
    assert mean == 0.5
    assert low == 0.0 and high == 1.0
    assert "pass@10" not in found


@needs_sandbox
def test_ten_programs_a_row_give_pass_at_1_and_10(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten programs 3 and 0 are right: pass@1 is 3/10 and 0, pass@10 is 1 and 0."""
    task = task_of([row(1), row(2)], tiny_folder)
    answers = [RIGHT.format(n=1)] * 3 + [WRONG.format(n=1)] * 7 + [WRONG.format(n=2)] * 10
    found = scored(task, tiny_folder, monkeypatch, answers, Programs(samples=10))
    assert found["pass@1"][0] == pytest.approx(0.15)
    assert found["pass@10"][0] == pytest.approx(0.5)


@needs_sandbox
def test_only_rows_with_tests_count(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of([row(1), row(2, tests=""), row(3)], tiny_folder)
    answers = [RIGHT.format(n=1), WRONG.format(n=2), RIGHT.format(n=3)]
    assert task.tested == [0, 2]
    found = scored(task, tiny_folder, monkeypatch, answers, Programs())
    assert found["pass@1"] == [1.0, 1.0, 1.0]


def test_without_leave_nothing_runs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither in the sandbox, nor outside it: no marker is written and no sandbox is started."""
    marker = tmp_path / "ran"
    deed = f"open({str(marker)!r}, 'w').close()"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr("manylora.evaluate.programs.run_program", refuse)
    monkeypatch.setattr("manylora.evaluate.code.run_program", refuse)
    rows = [row(i, tests=f"{deed}\nassert f(1)") for i in range(4)]
    found = scored(task_of(rows, tiny_folder), tiny_folder, monkeypatch, [deed] * 4, None)
    assert not marker.exists()
    assert set(found) == {"nll", "exact_match", "token_f1", "rouge_l", "bleu"}


def test_the_table_says_that_there_are_tests_and_what_runs_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    task = task_of([row(1), row(2)], tiny_folder)
    metrics = {"t": {"nll": [1.0, 1.0, 1.0]}}
    for after, said in ((metrics, True), ({"t": {**metrics["t"], "pass@1": [1.0] * 3}}, False)):
        write_scores(tmp_path, [task], after, after)
        console = told()
        print_scores(tmp_path, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert (f"t: 2 held-out rows carry tests; `manylora eval {tmp_path} --allow-code`" in text
                ) is said  # fmt: skip
        assert ("pass@1" in text) is not said


def test_rows_without_tests_are_kept_as_before(tiny_folder: Path, tmp_path: Path) -> None:
    task = task_of([row(1, tests=""), row(2, tests="")], tiny_folder)
    metrics = {"t": {"nll": [1.0, 1.0, 1.0]}}
    write_scores(tmp_path, [task], metrics, metrics)
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "tasks": {"t": {"n": 2, "before": metrics["t"], "after": metrics["t"]}}
    }
    console = told()
    print_scores(tmp_path, console)
    assert "tests" not in console.file.getvalue()  # type: ignore[attr-defined]


@needs_sandbox
def test_rows_whose_own_answer_fails_their_tests_are_told() -> None:
    rows = [row(1), row(2, answer=WRONG), row(3)]
    said = own_answers_that_fail("t", rows, Programs())
    assert "t: the right answers of 1 of 3 rows do not pass the rows' own tests" in said
    assert "t:2: AssertionError" in said
    assert own_answers_that_fail("t", [row(1), row(3)], Programs()) == ""


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("So:\n```python\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n"),
        ("```bash\nls\n```\n```Python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```python\ns = '```'\nx = 1\n```", "s = '```'\nx = 1\n"),
        ("", ""),
    ],
)
def test_code_is_taken_out_of_its_fence(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Programs(**wrong)


def test_programs_are_drawn_where_several_are_written() -> None:
    assert Programs().sampling is None
    assert Programs(samples=10).sampling == Sampling(0.2, 0.95)
    assert Programs(temperature=0.8).sampling == Sampling(0.8, 0.95)


def test_drawn_answers_differ_and_a_cold_draw_is_the_greedy_one(tiny_folder: Path) -> None:
    model, prompts = load_model(str(tiny_folder)), [[5, 9, 30, 7]] * 6
    hot = generate_answers(model, prompts, 0, [0], 8, sampling=Sampling(5.0, 1.0))
    assert len({tuple(answer) for answer in hot}) > 1
    cold = generate_answers(model, prompts, 0, [0], 8, sampling=Sampling(1e-4, 0.95))
    assert cold == generate_answers(model, prompts, 0, [0], 8)


@pytest.fixture
def code_run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A run with a task of code, of which the right answers pass, and one without tests."""
    data = tmp_path / "data"
    data.mkdir()
    for name, own in (("code", {"tests": "assert f"}), ("plain", {})):
        lines = [
            json.dumps({"instruction": f"Name {i}.", "output": f"f = 'a b c {i + 1}'", **own})
            for i in range(20)
        ]
        (data / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = make_recipe()
    return train(recipe.model_copy(update={"data": str(data)}), told())


@needs_sandbox
def test_a_run_is_scored_with_pass_at_k_only_when_asked(code_run: Path) -> None:
    def kept() -> dict[str, Any]:
        tasks: dict[str, Any] = json.loads((code_run / "scores.json").read_text())["tasks"]
        return tasks

    before = kept()
    assert before["code"]["tests"] == before["code"]["n"] == 4
    assert "tests" not in before["plain"]
    assert "pass@1" not in before["code"]["after"]
    console = told()
    evaluate_run(code_run, console, Programs(samples=10, temperature=2.0))
    for when in ("before", "after"):
        found = kept()["code"][when]
        assert {"pass@1", "pass@10"} <= set(found)
        assert {metric: found[metric] for metric in before["code"][when]} == before["code"][when]
    assert kept()["plain"] == before["plain"]
    assert "own tests" not in console.file.getvalue()  # type: ignore[attr-defined]
    evaluate_run(code_run, told())
    assert kept() == before
