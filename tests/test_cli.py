"""The command as a person uses it: real arguments, exit codes, messages."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manylora.cli import main
from manylora.evaluate import held_out
from manylora.evaluate.scores import score_tasks
from manylora.recipe import Recipe
from manylora.train import train
from tiny import write_tasks


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, text: str = "") -> Done:
    """`manylora ARGUMENTS` in this process: importing PEFT anew takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["manylora", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(text))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def test_the_installed_command_exits_with_one_message() -> None:
    program = Path(sys.executable).with_name("manylora")
    done = subprocess.run([program, "train"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'data' is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run of the command itself, with one branch for each task."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_tasks(folder / "tasks", rows=40)
    done = command(
        "train",
        f"data={data}",
        f"model={tiny_folder}",
        f"output={folder / 'run'}",
        "adapter.method=branch_per_cluster",
        "adapter.r=4",
        "train.max_steps=4",
        "train.precision=fp32",
        "evaluate.rows_per_task=4",
    )
    assert done.returncode == 0, done.stderr
    assert "colour" in done.stdout and "exact match" in done.stdout
    return folder / "run"


def test_train_leaves_a_whole_run_folder(routed: Path) -> None:
    names = {path.name for path in routed.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "branch_selector.safetensors",
        "recipe.yaml",
        "metrics.jsonl",
        "scores.json",
        "summary.json",
        "report.html",
        "README.md",
    }


def test_predict_answers_every_row_in_order_and_names_the_branch(
    routed: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": "colour?", "input": "sky 1"}, {"instruction": "parity?", "input": "4"}]
    file = tmp_path / "ask.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("predict", routed, file, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    asked = [row["messages"][-1]["content"] for row in answers]
    assert asked == ["colour?\nsky 1", "parity?\n4"]
    assert [row["source"] for row in answers] == ["ask.jsonl:1", "ask.jsonl:2"]
    assert [row["branch"] for row in answers] == ["colour", "parity"]
    assert all(isinstance(row["prediction"], str) for row in answers)
    written = command("predict", routed, file, "--output", tmp_path / "out.jsonl", "--task", "copy")
    assert written.returncode == 0, written.stderr
    out = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["branch"] for line in out] == ["copy", "copy"]


def test_predict_refuses_an_unknown_task_and_a_bad_row(routed: Path, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text('{"instruction": "colour?", "input": "sky"}\n')
    done = command("predict", routed, file, "--task", "nothing")
    assert done.returncode == 1
    assert "no task 'nothing' in this run; it has colour, copy, parity" in done.stderr
    file.write_text('{"text": "?"}\n')
    done = command("predict", routed, file)
    assert done.returncode == 1
    assert "ask.jsonl:1" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


def test_predict_says_where_it_cannot_write(routed: Path, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text('{"instruction": "colour?", "input": "sky"}\n')
    done = command("predict", routed, file, "--output", tmp_path / "none" / "out.jsonl")
    assert done.returncode == 1
    assert "out.jsonl cannot be written: No such file or directory; choose" in done.stderr


def test_a_task_is_refused_by_a_run_that_does_not_choose_by_task(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = train(make_recipe(method="lora"))
    file = tmp_path / "ask.jsonl"
    file.write_text('{"instruction": "colour?", "input": "sky"}\n')
    for done in (
        command("chat", run, "--task", "colour", text="sky 1\n"),
        command("predict", run, file, "--task", "colour"),
    ):
        assert (done.returncode, done.stdout) == (1, "")
        assert "does not choose its branch by task, so task='colour'" in done.stderr


def test_chat_refuses_an_unknown_task_before_it_asks(routed: Path) -> None:
    done = command("chat", routed, "--task", "nothing", text="sky 1\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no task 'nothing' in this run; it has colour, copy, parity" in done.stderr


def test_chat_answers_and_ends(routed: Path) -> None:
    done = command("chat", routed, "--max-new-tokens", 4, text="sky 1\n/new\nparity 3\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4


def test_export_writes_one_lora_a_branch(routed: Path, tmp_path: Path) -> None:
    done = command("export", routed, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact, logits within") == 3
    assert (tmp_path / "out" / "parity" / "adapter_model.safetensors").is_file()


def test_eval_scores_again(routed: Path) -> None:
    before = (routed / "scores.json").read_text()
    done = command("eval", routed)
    assert done.returncode == 0, done.stderr
    assert (routed / "scores.json").read_text() == before


def test_eval_scores_as_many_rows_at_a_time_as_it_is_told(
    routed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (routed / "scores.json").read_text()
    sizes: list[int] = []

    def told(*given: Any) -> Any:
        sizes.append(given[4])
        return score_tasks(*given)

    monkeypatch.setattr(held_out, "score_tasks", told)
    done = command("eval", routed, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert sizes == [2, 2]
    (routed / "scores.json").write_text(before)  # the last digits are those of the batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", 3, "--base"], "--limit and --base are for benchmarks alone; name them with"),
        (["--data-dir", "bench"], "--data-dir is for benchmarks alone"),
        (["--samples", 10], "--samples is for programs that the model writes; add --allow-code"),
        (["--temperature", 0.5], "--temperature is for programs that the model writes"),
        (["--allow-code", "--temperature", 0], "temperature=0.0: give more than 0"),
        (["--tasks", "boolq", "--temperature", 0.5], "--temperature is for the run's own rows"),
    ],
)
def test_eval_refuses_options_that_would_change_nothing(
    routed: Path, options: list[object], message: str
) -> None:
    before = (routed / "scores.json").read_bytes()
    done = command("eval", routed, *options)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert (routed / "scores.json").read_bytes() == before


def test_eval_says_where_there_are_no_tests_to_run(routed: Path) -> None:
    before = (routed / "scores.json").read_text()
    done = command("eval", routed, "--allow-code", "--samples", 10)
    assert done.returncode == 0, done.stderr
    assert "no held-out row has tests" in " ".join(done.stderr.split())
    assert (routed / "scores.json").read_text() == before


def test_router_export_is_refused_with_the_alternative(make_recipe: Callable[..., Recipe]) -> None:
    run = train(make_recipe(method="hydralora"))
    done = command("export", run)
    assert done.returncode == 1
    assert "--static" in done.stderr and "Traceback" not in done.stderr
    assert command("export", run, "--static").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "'data' is missing"),
        (["train", "data=/no/such/place"], "no such file or folder"),
        (["train", "data=samples", "adapter.metod=lora"], "did you mean 'method'?"),
        (["train", "no.yaml"], "no recipe at no.yaml"),
        (["train", "data=samples", "adapter.branch_ranks=[1,2]"], "branch_ranks=[1, 2] differ"),
        (
            ["quickstart", "--output", "a", "output=b"],
            "--output a and output=b are two run folders",
        ),
        (["train", "data=samples", "seed[red]"], "'seed[red]' is not key=value"),
        (["chat", "/no/such/run"], "not a finished run"),
        (["eval", "."], "not a finished run"),
        (["train", "data=samples", "model=/no/model", "output=/tmp/never"], "/no/model"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from the runs of whoever tests
    done = command(*arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_existing_path_with_an_equals_sign_is_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3.yaml").write_text("data: /no/such/place\n")
    done = command("data", "lr=3.yaml")
    assert done.returncode == 1
    assert "/no/such/place: no such file or folder" in " ".join(done.stderr.split())


def test_doctor_reports_without_a_recipe() -> None:
    done = command("doctor")
    assert done.returncode in (0, 1)
    assert "peft" in done.stdout and "Traceback" not in done.stderr


def test_help_lists_the_verbs() -> None:
    done = command("--help")
    assert done.returncode == 0
    for verb in (
        "quickstart",
        "init",
        "data",
        "train",
        "eval",
        "predict",
        "chat",
        "export",
        "doctor",
    ):
        assert verb in done.stdout
