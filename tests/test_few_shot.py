"""The rows of a new task: examples for the search, and others to score on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from manylora.base import load_tokenizer
from manylora.composing.few_shot import few_shot
from manylora.corpus import CorpusError, Encoder, Fields


def rows_of(file: Path, questions: Sequence[str]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": q, "completion": "yes"}) + "\n" for q in questions]
    file.write_text("".join(lines))
    return str(file)


def drawn(tiny_folder: Path, data: str, examples: int) -> tuple[list[str], list[str]]:
    """The questions of the examples and of the held-out rows."""
    tokenizer = load_tokenizer(str(tiny_folder))
    encoder, quiet = Encoder(tokenizer, 64), Console(quiet=True)
    found = few_shot(data, Fields(), examples, 0, encoder, quiet)
    texts = [tokenizer.decode(shot.input_ids[: shot.prompt_length]) for shot in found.shots]
    held = [e.prompt[0]["content"] for task in found.held_out for e in task.examples]
    return [text.split("<|user|>")[1].split("<|end|>")[0] for text in texts], held


def test_examples_and_held_out_rows_never_ask_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    questions = [f"q{i // 2}" for i in range(60)]  # each twice
    shots, held = drawn(tiny_folder, rows_of(tmp_path / "t.jsonl", questions), 20)
    assert len(shots) == 20 and len(held) == 40 and not set(shots) & set(held)


def test_few_rows_are_halved_and_two_are_enough(tiny_folder: Path, tmp_path: Path) -> None:
    shots, held = drawn(tiny_folder, rows_of(tmp_path / "t.jsonl", "abcdefgh"), 20)
    assert len(shots) == 4 and len(held) == 4
    shots, held = drawn(tiny_folder, rows_of(tmp_path / "u.jsonl", "ab"), 20)
    assert len(shots) == 1 and held == []  # one row gives no interval
    with pytest.raises(CorpusError, match="one row"):
        drawn(tiny_folder, rows_of(tmp_path / "v.jsonl", "a"), 20)


def test_a_test_folder_is_scored_but_for_what_the_examples_ask(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows_of(tmp_path / "data" / "train" / "t.jsonl", "abc")
    rows_of(tmp_path / "data" / "test" / "t.jsonl", "bxyz")
    shots, held = drawn(tiny_folder, str(tmp_path / "data"), 20)
    assert sorted(shots) == ["a", "b", "c"] and held == ["x", "y", "z"]


def test_several_tasks_are_refused(tiny_folder: Path, task_folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"3 tasks \(colour, copy, parity"):
        drawn(tiny_folder, str(task_folder), 4)
