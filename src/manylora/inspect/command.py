"""`manylora inspect`: gather what a run's files and a little computing tell, and write the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from manylora.inspect.frames import Inspection
from manylora.inspect.gather import Options, everything
from manylora.inspect.kept import write_kept
from manylora.report.inspection import write_inspection_page
from manylora.report.page import PAGE_FILE, write_report
from manylora.run import SUMMARY_FILE
from manylora.training.checkpoints import make_writable

INSPECT_PAGE = "inspect.html"
KEPT = (
    *("singular_values", "spectra", "subspaces", "projection", "initialisation", "likeness"),
    *("interference", "transfer"),
)


def inspect_runs(
    runs: Sequence[Path], output: Path | None, options: Options, console: Console
) -> tuple[Inspection, Path]:
    """Look into these runs or adapter folders; returns what was found and the page about it.

    One finished run: its report.html, and its tables in RUN/inspection/. Several, another output or
    an adapter folder that is no run of manylora: a page of its own (inspect.html).

    Raises FileNotFoundError and ValueError as `manylora.inspect.gather.everything`; OSError where
    the page cannot be written, before anything is computed.
    """
    own = len(runs) == 1 and output is None and (runs[0] / SUMMARY_FILE).is_file()
    path = runs[0] / PAGE_FILE if own else output or Path(INSPECT_PAGE)
    if path.is_dir():
        path = path / INSPECT_PAGE
    make_writable(path.parent, str(path), "--output PAGE.html")
    found = everything(runs, options, console)
    if own:
        write_kept(runs[0], {name: found.frames[name] for name in KEPT if name in found.frames})
        return found, write_report(runs[0])
    said = [(name, what_it_is(run)) for name, run in zip(found.runs, runs, strict=True)]
    return found, write_inspection_page(found, path, said)


def what_it_is(run: Path) -> str:
    """A run in a few words: its method, model, size and steps, where summary.json says them."""
    file = run / SUMMARY_FILE
    if not file.is_file():
        return str(run)
    summary = json.loads(file.read_text(encoding="utf-8"))
    return (
        f"{summary['method']} on {Path(summary['model']).name}, "
        f"{summary['trainable_parameters']:,} parameters, {summary['steps']:,} steps"
    )


def lines_of(found: Inspection, page: Path) -> list[str]:
    """What the command says at its end: what stands out, and where the page is."""
    lines = []
    for run, of_run in found.findings.items():
        for finding in of_run:
            lines.append(f"{run}: {finding.text}")
            if finding.remedy:
                lines.append(f"    {finding.remedy}")
    return [*lines, str(page)]
