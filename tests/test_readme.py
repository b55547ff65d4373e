"""The README says what is true: its commands exist, its figures are those that were kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from manylora.cli import app
from manylora.evaluate.table import print_scores
from manylora.init import init
from manylora.recipe import load_recipe
from tiny import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEPT = ROOT / "benchmarks" / "results" / "quickstart.json"


def commands() -> list[list[str]]:
    """Of the README and of the page on the method that is ours."""
    pages = README + (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", pages, re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    words = [re.split(r"&&", line)[-1].split() for line in lines]
    return [line for line in words if line[:1] == ["manylora"]]


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `manylora init` writes."""
    file = tmp_path_factory.mktemp("init") / "recipe.yaml"
    init(["samples"], file, Console(stderr=True), str(tiny_folder))
    return file


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_exists_and_its_changes_fit_the_recipe(
    words: list[str], recipe: Path
) -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert words[1] in verbs
    changes = [word for word in words[2:] if "=" in word]
    files = [recipe for word in words[2:] if word == "recipe.yaml"]
    if words[1] in ("train", "doctor", "data") and "--resume" not in words:
        assert load_recipe(files[0] if files else None, changes).data


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """.ci/run takes the command from this file; the same extraction must find pytest in it."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    line = next(line for line in script.splitlines() if line.startswith("command="))
    done = subprocess.run(
        ["bash", "-c", f'{line}\necho "$command"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert "pip install -c constraints.txt -e '.[test]'" in done.stdout
    assert done.stdout.strip().endswith("python -m pytest")


def test_library_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    names = {"base_model": tiny_llama()}
    exec(code[1], names)  # the README's own text
    assert names["model"].peft_config["default"].method == "hydralora"


def test_figures_are_the_kept_ones_as_they_were_printed(tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    (tmp_path / "scores.json").write_text(json.dumps(kept["scores"]))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_scores(tmp_path, console)
    for line in console.export_text().splitlines():
        assert line.rstrip() in README
    assert kept["summary"]["device"] in README
