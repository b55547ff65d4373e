"""A part of what benchmarks/fuzz_adapters.py does, the check itself, and the command line."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import folder_check
from folder_check import CHECKPOINT, KINDS, base_model, check, make_adapter
from folder_fuzzing import WEIGHTS, mutate
from fuzz_check import ViolationError
from manylora.cli import main

INPUTS = 120


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter folder of each kind, not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    return {kind: make_adapter(kind, folder / kind) for kind in KINDS}


@pytest.fixture
def run(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the HydraLoRA run, to be damaged."""
    return Path(shutil.copytree(sources["hydralora"], tmp_path / "run"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_folder_is_loaded_as_it_is_or_refused_with_one_error(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    base, outcomes = base_model(), set()
    for number in range(INPUTS):
        folder = tmp_path / str(number)
        change = mutate(sources[kind], folder, number, seed=3)
        outcome = check(folder, base, kind == CHECKPOINT)
        assert outcome == "loaded" or change != "nothing"
        outcomes.add(outcome)
    assert outcomes == {"loaded", "refused"}


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr of `manylora ARGUMENTS`, in this process."""
    err = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(err),
        redirect_stdout(io.StringIO()),
    ):
        patch.setattr(sys, "argv", ["manylora", *map(str, arguments)])
        try:
            main()
            return 0, err.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()


def test_the_command_line_gives_one_message_and_no_traceback(run: Path) -> None:
    rows = run.parent / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n', encoding="utf-8")
    whole = (run / WEIGHTS).read_bytes()
    (run / WEIGHTS).write_bytes(whole[:-10])
    code, err = command("predict", run, rows)
    assert code == 1
    assert err.startswith(f"error: {run / WEIGHTS}: is damaged")
    assert "Traceback" not in err
    assert err.count("\n") == 1


def load_anything(folder: Path) -> Any:
    raise KeyError("lm_head")


def load_and_write(folder: Path) -> Any:
    (folder / "half").write_text("written", encoding="utf-8")
    raise ValueError(f"{folder}")


def load_and_say_little(folder: Path) -> Any:
    raise ValueError("no")


def load_and_execute(folder: Path) -> Any:
    os.mkdir(folder.parent / "executed")
    raise ValueError(f"{folder}")


WRONG = {load_anything: "KeyError", load_and_write: "files were written"}
WRONG |= {load_and_say_little: "names no file", load_and_execute: "was executed"}


@pytest.mark.parametrize("load", WRONG)
def test_the_check_itself_finds_what_is_wrong(
    run: Path, load: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_check.manylora, "load", load)
    monkeypatch.setattr(folder_check, "_peft_knows_it", lambda folder: False)
    with pytest.raises(ViolationError, match=WRONG[load]):
        check(run, base_model())
