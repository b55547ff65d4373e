"""What `manylora doctor` found, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "note", "problem"]

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; a problem would stop the run. table: rows to show below the text."""

    topic: str
    status: Status
    text: str
    remedy: str = ""
    table: tuple[tuple[str, str, str], ...] = ()


def print_findings(findings: Sequence[Finding], console: Console) -> int:
    """Show the findings by topic; returns the exit code, 1 when something would stop the run."""
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"[bold]{topic}")
        colour = _COLOURS[finding.status]
        console.print(f"  [{colour}]{finding.status:<8}[/]{escape(finding.text)}", highlight=False)
        if finding.remedy:
            console.print(f"          [cyan]{escape(finding.remedy)}", highlight=False)
        if finding.table:
            console.print(_table(finding.table))
    problems = sum(finding.status == "problem" for finding in findings)
    console.print(
        f"[red]{problems} problem(s) would stop a run"
        if problems
        else "[green]nothing found that would stop a run"
    )
    return 1 if problems else 0


def _table(rows: tuple[tuple[str, str, str], ...]) -> Table:
    table = Table("for", "GB", "how", box=None, padding=(0, 2, 0, 8))
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
