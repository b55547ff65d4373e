"""`manylora discover` as a person uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from manylora.adapter.selector import BranchSelector
from manylora.base import load_tokenizer
from manylora.corpus import Encoder, read_rows
from manylora.discovery import command as module
from manylora.discovery.command import discover_files
from manylora.discovery.folder import read_assignments
from manylora.discovery.result import read_discovery
from test_cli import command
from test_discovery import WORDS, corpus
from tiny import write_tasks

FILES = {
    "discovery.json",
    "assignments.parquet",
    "discovery.html",
    "branch_selector.safetensors",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_rows(file: Path, each: int = 40, **names: str) -> Path:
    """One file of three subjects; names: of the columns prompt, output and category."""
    columns = {"prompt": "prompt", "output": "output", "category": "category"} | names
    texts, tasks = corpus(each)
    rows = [
        {columns["prompt"]: text, columns["output"]: "done", columns["category"]: task}
        for text, task in zip(texts, tasks, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows_of(folder: Path) -> Iterator[dict[str, object]]:
    yield from pq.read_table(folder / "assignments.parquet").to_pylist()


def test_one_file_gives_a_whole_folder_and_says_what_is_in_it(
    tmp_path: Path, tiny_folder: Path
) -> None:
    file, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "found"
    done = command("discover", file, "--output", output, "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in output.iterdir()} == FILES
    assert "3 clusters in 120 documents" in done.stdout
    assert "column 'category'" in done.stderr
    assert all(subject in done.stdout for subject in WORDS)
    last = done.stdout.rstrip().splitlines()[-2:]
    assert str(output) in last[0] and f"tasks: {output}" in last[1] and "auto" in last[1]
    found = read_discovery(output)
    assert found.k == 3
    assert found.agreement is not None and set(found.agreement.rows) == set(WORDS)
    assert [row["source"] for row in rows_of(output)][:2] == ["rows.jsonl:81", "rows.jsonl:82"]


def test_every_row_of_the_data_is_among_the_assignments(tmp_path: Path, tiny_folder: Path) -> None:
    for part, each in (("train", 40), ("test", 10)):
        (tmp_path / "data" / part).mkdir(parents=True)
        write_rows(tmp_path / "data" / part / "all.jsonl", each)
    found = discover_files(
        [str(tmp_path / "data")], tmp_path / "found", model=str(tiny_folder), console=quiet()
    )
    assert found.discovery.documents == len(found.labels) == 150
    rows = read_rows(tmp_path / "data")
    for own in (rows.train["all"], rows.test["all"]):
        clusters = read_assignments(tmp_path / "found").cluster_of(own.keys)
        assert len(clusters) == len(own) and clusters.min() >= 0
    assert len(rows.train["all"]) == 120 and len(rows.test["all"]) == 30


def quiet() -> Console:
    return Console(quiet=True)


def test_the_selector_sends_a_new_prompt_to_its_cluster(tmp_path: Path, tiny_folder: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 120)
    discover_files(
        [str(tmp_path / "rows.jsonl")], tmp_path / "found", model=str(tiny_folder), console=quiet()
    )
    found = read_discovery(tmp_path / "found")
    assert found.agreement is not None
    home = {task: counts.index(max(counts)) for task, counts in found.agreement.rows.items()}
    selector = BranchSelector.load(tmp_path / "found" / "branch_selector.safetensors")
    assert selector.names == found.names
    encoder = Encoder(load_tokenizer(str(tiny_folder)), 10_000)
    texts, tasks = corpus(20, seed=1)
    right = 0
    for text, task in zip(texts, tasks, strict=True):
        ids = torch.tensor([encoder.prompt_ids([{"role": "user", "content": text}])])
        right += int(selector.select(ids, torch.ones_like(ids))) == home[task]
    assert right >= 0.9 * len(texts)


def test_files_of_several_tasks_are_compared_by_their_names(
    tmp_path: Path, tiny_folder: Path
) -> None:
    data = write_tasks(tmp_path / "tasks", rows=40)
    output = tmp_path / "found"
    done = command(
        *("discover", data / "colour.jsonl", data / "parity.jsonl"),
        *("--output", output, "--model", tiny_folder, "--clusters", 2, "--max-clusters", 5),
    )
    assert done.returncode == 0, done.stderr
    found = read_discovery(output)
    assert (found.k, found.chosen_by, len(found.curve)) == (2, "given", 5)
    assert found.agreement is not None and set(found.agreement.rows) == {"colour", "parity"}


def test_columns_and_bad_rows_are_named_as_in_a_recipe(tmp_path: Path, tiny_folder: Path) -> None:
    names = {"prompt": "ask", "output": "reply", "category": "kind"}
    file = write_rows(tmp_path / "rows.jsonl", **names)
    with file.open("a") as more:
        more.write('{"ask": 3, "reply": [], "kind": "x"}\n')
    arguments = ["discover", file, "--output", tmp_path / "found", "--model", tiny_folder]
    assert "cannot be used" in command(*arguments).stderr
    fields = ["fields.prompt=ask", "fields.output=reply", "fields.task=kind"]
    assert "1 rows cannot be used" in command(*arguments, *fields).stderr
    assert not (tmp_path / "found").exists()
    done = command(*arguments, *fields, "on_bad_row=skip")
    assert done.returncode == 0, done.stderr
    assert "1 rows cannot be used and are left out" in done.stderr
    found = read_discovery(tmp_path / "found")
    assert found.agreement is not None and set(found.agreement.rows) == set(WORDS)


def test_a_used_folder_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_folder: Path
) -> None:
    file, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "found"
    arguments = ["discover", file, "--output", output, "--model", tiny_folder]
    assert command(*arguments).returncode == 0
    before = (output / "discovery.json").read_bytes()
    done = command("discover", "/no/such/file", *arguments[2:])
    assert done.returncode == 1
    assert "holds a discovery already; choose another with --output" in " ".join(
        done.stderr.split()
    )
    assert (output / "discovery.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/file.jsonl"], "no such file or folder"),
        (["rows.jsonl", "train.epochs=3"], "'train.epochs=3' is no file or folder"),
        (["rows.jsonl", "fields.promt=ask"], "did you mean 'prompt'?"),
        (["rows.jsonl", "--clusters", "5000"], "5000 clusters are asked for"),
        (["empty.jsonl"], "none of the 2 prompts has a letter or a digit"),
        (["rows.jsonl", "--model", "/no/model"], "/no/model"),
    ],
)
def test_mistakes_are_one_message_and_leave_no_folder(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    lines = [json.dumps({"prompt": mark, "output": "yes"}) + "\n" for mark in ("?!", "...")]
    (tmp_path / "empty.jsonl").write_text("".join(lines))
    done = command("discover", "--output", "found", "--model", tiny_folder, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "found").exists()


def test_the_model_can_read_the_documents_and_says_when_that_is_long(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONG", 0.0)
    file, output = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "found"
    options = ["--features", "model", "--max-clusters", 4, "--model", tiny_folder]
    done = command("discover", file, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    assert "60 documents are about" in done.stderr and "--features tfidf" in done.stderr
    assert "mean hidden state" in read_discovery(output).settings["features"]


def test_help_lists_the_verb() -> None:
    assert "discover" in command("--help").stdout
