"""docs/export.md and docs/serving.md say what the code prints and what the kept results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manylora.cli import app
from manylora.export import Export
from manylora.export.engines import command_lines
from manylora.export.static_table import COLUMNS, gap_cells

ROOT = Path(__file__).resolve().parent.parent


def kept(name: str) -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def written(page: str, name: str) -> str:
    """What stands on the page after <!-- name -->."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found is not None, name
    return found[1].strip()


def static_table(name: str) -> str:
    cells = gap_cells([Export(**fields) for fields in kept(name)["exports"]])
    lines = ["| task | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for task, row in sorted(cells.items()):
        lines.append(f"| {task} | " + " | ".join(row[column] for column in COLUMNS) + " |")
    return "\n".join(lines)


def load_sentence() -> str:
    found = kept("serve_load")
    assert found["errors"] == [] and found["p99_over_p50"] <= 3
    return (
        f"{found['streams']} streams at once with the official client, of {found['tokens']} tokens "
        f"each, {found['rounds']} times, adapter and base mixed (SmolLM2-135M, {found['device']}): "
        f"no error; the time to finish was {found['finish_p50_s']:.1f} s at the median and "
        f"{found['p99_over_p50']:.2f} times that at the 99th percentile, "
        f"{found['tokens_per_second']:.0f} tokens a second (`benchmarks/serve_load.py`)."
    )


def fuzz_sentence() -> str:
    kinds = kept("fuzz_requests")["requests"]
    total = sum(kind["inputs"] for kind in kinds.values())
    bad = sum(kind[what] for kind in kinds.values() for what in ("violations", "crashes", "hangs"))
    statuses = {int(key) for kind in kinds.values() for key in kind if key.isdigit()}
    assert total >= 10_000 and bad == 0 and max(statuses) < 500
    return (
        f"{total:,} damaged requests (odd JSON values, damaged bytes, broken HTTP) to a live "
        "server: each got an answer, an error of the sender's own (4xx) or a closed connection; "
        "no status of 500 or more, no hang, and the server went on and ended in order "
        "(`benchmarks/fuzz_requests.py`)."
    )


@pytest.mark.parametrize(
    ("place", "name"), [("static", "static_export"), ("static long", "static_export_270_steps")]
)
def test_the_static_tables_follow_from_the_kept_results(place: str, name: str) -> None:
    assert written("export.md", place) == static_table(name)


def test_the_command_lines_are_those_that_export_prints() -> None:
    folders = {name: Path("runs/mine/export") / name for name in ("colour", "copy")}
    lines = "\n".join(command_lines("BASE", folders, 12))
    assert written("export.md", "commands") == f"```\n{lines}\n```"


def test_the_figures_of_serving_follow_from_the_kept_results() -> None:
    assert " ".join(written("serving.md", "load").split()) == load_sentence()
    assert " ".join(written("serving.md", "fuzz").split()) == fuzz_sentence()


def test_every_option_on_the_pages_is_there() -> None:
    run = CliRunner()
    for page, verbs in (
        ("export.md", ("export", "import", "autoload")),
        ("serving.md", ("serve",)),
    ):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        text = re.sub(r"<!-- commands -->.*?<!-- end -->", "", text, flags=re.DOTALL)
        options = set(re.findall(r"(?<=[\s`])--[a-z][a-z-]*", text))
        wide = {"COLUMNS": "200", "TERM": "dumb"}
        helps = [run.invoke(app, [verb, "--help"], env=wide).output for verb in verbs]
        assert len(options) > 3
        assert not [option for option in options if option not in "".join(helps)], page


def test_the_readme_says_what_one_fit_for_all_tasks_loses() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    column = COLUMNS.index("fit, all tasks")
    lost = []
    for name in ("static_export", "static_export_270_steps"):
        cells = gap_cells([Export(**fields) for fields in kept(name)["exports"]])
        lost.append(max(float(row[COLUMNS[column]].split()[0]) for row in cells.values()))
    words = (
        f"lost at most {lost[0]:.1f} % of what training gave after 45 steps, and {lost[1]:.1f} %"
    )
    assert f"one fit for all of the quickstart's tasks {words}" in readme
