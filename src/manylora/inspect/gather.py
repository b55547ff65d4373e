"""The tables of one run or of several: what their files alone give, and what takes computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console

from manylora.findings import Finding
from manylora.inspect.adapters import Adapter, read
from manylora.inspect.frames import Inspection
from manylora.inspect.initialisation import initialisation, summary
from manylora.inspect.interference import ROWS, interference
from manylora.inspect.kept import read_kept
from manylora.inspect.pieces import Matrix
from manylora.inspect.projection import State, projection
from manylora.inspect.selector import confusion, distances
from manylora.inspect.spectra import both
from manylora.inspect.subspaces import subspaces
from manylora.inspect.tokens import kept_layers, tokens
from manylora.inspect.training import training
from manylora.inspect.transfer import transfer
from manylora.inspect.usage import entropy, information, usage
from manylora.inspect.warnings import findings

Measure = Callable[[], pd.DataFrame]


def _tokens(run: Path) -> pd.DataFrame:
    """The mean over layers (layer ""), and the layers that are kept by themselves."""
    mean = tokens(run)
    if mean.empty:
        return mean
    single = [tokens(run, layer).assign(layer=layer) for layer in kept_layers(run)]
    return pd.concat([mean.assign(layer=""), *single], ignore_index=True)


MATRICES: tuple[Matrix, ...] = ("A", "B")
DIRECTIONS = 8  # i and j of phi go up to this
OF_FILES: dict[str, Callable[[Path], pd.DataFrame]] = {
    "usage": usage,
    "entropy": entropy,
    "information": information,
    "tokens": _tokens,
    "confusion": confusion,
    "distances": distances,
    "training": training,
}
COMPUTED = ("subspaces", "projection", "initialisation", "likeness")
ASKED = {
    "interference": "`manylora inspect {run} --interference` measures it: a forward and a "
    "backward pass over held-out rows of every task",
    "transfer": "`manylora inspect {run} --leave-out TASK` measures it: trains again without TASK",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What to compute beyond the files; leave_out: tasks to train without."""

    interference: bool = False
    leave_out: tuple[str, ...] = ()
    rows: int = ROWS
    method: Literal["tsne", "umap"] = "tsne"


@dataclass(slots=True)
class _Tables:
    """Tables of several runs on their way to one."""

    parts: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, frame: pd.DataFrame, run: str) -> None:
        """A run is called as its reader calls it, which its folder's name may not be."""
        if not frame.empty:
            named = frame.assign(run=run) if "run" in frame.columns else frame
            self.parts.setdefault(name, []).append(named)

    def replace(self, name: str, frame: pd.DataFrame, run: str) -> None:
        """In the place of what was kept of that run."""
        others = [part for part in self.parts.get(name, []) if part["run"].iloc[0] != run]
        self.parts[name] = others
        self.add(name, frame, run)

    def try_to(self, name: str, run: str, measure: Measure) -> None:
        """Say why not, where there is nothing to measure."""
        try:
            self.add(name, measure(), run)
        except (FileNotFoundError, ValueError) as error:
            self.missing[name] = str(error)

    def joined(self) -> dict[str, pd.DataFrame]:
        return {name: pd.concat(parts, ignore_index=True) for name, parts in self.parts.items()}


def names_of(runs: Sequence[Path]) -> list[str]:
    """A short name for each folder: its own, with those above it where two are alike."""
    paths = [run.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is given twice: {', '.join(map(str, runs))}; give each once")


def from_files(run: Path) -> Inspection:
    """What the files of a run give at once, and what an earlier inspection of it computed."""
    name = run.resolve().name
    tables = _Tables()
    kept = read_kept(run)
    for measure, frame in kept.items():
        tables.add(measure, frame, name)
    found: list[Finding] = []
    try:
        _spectra(tables, read(run), kept)
        found = findings(run)
    except (FileNotFoundError, ValueError) as error:
        tables.missing["spectra"] = str(error)
    _of_files(tables, run, name)
    for measure in COMPUTED:
        if measure not in kept:
            tables.missing[measure] = f"`manylora inspect {run}` adds it"
    _not_asked(tables, str(run))
    return Inspection([name], tables.joined(), tables.missing, {name: found})


def _spectra(tables: _Tables, adapter: Adapter, kept: Iterable[str]) -> None:
    names = ("singular_values", "spectra")
    if set(names) <= set(kept):
        return
    for name, frame in zip(names, both(adapter), strict=True):
        if name not in kept:
            tables.add(name, frame, adapter.name)


def _of_files(tables: _Tables, run: Path, name: str) -> None:
    for measure, of in OF_FILES.items():
        tables.try_to(measure, name, partial(of, run))


def _not_asked(tables: _Tables, run: str) -> None:
    for measure, how in ASKED.items():
        if measure not in tables.parts:
            tables.missing[measure] = how.format(run=run)


def everything(runs: Sequence[Path], options: Options, console: Console) -> Inspection:
    """All tables of these runs together.

    Raises FileNotFoundError and ValueError for a folder that holds no update, for a run given
    twice, and for what was asked for and cannot be measured.
    """
    names = names_of(runs)
    adapters = [read(run, name) for run, name in zip(runs, names, strict=True)]
    tables = _Tables()
    for run, adapter in zip(runs, adapters, strict=True):
        console.print(f"{adapter.name}: spectra, routing, training", highlight=False)
        kept = read_kept(run)
        for measure in ("singular_values", "spectra", *ASKED):
            if measure in kept:
                tables.add(measure, kept[measure], adapter.name)
        _spectra(tables, adapter, kept)
        _of_files(tables, run, adapter.name)
        _asked(tables, run, adapter.name, options, console)
    console.print("shared directions", highlight=False)
    _between(tables, adapters)
    console.print("matrices on a plane", highlight=False)
    _plane(tables, adapters, options)
    _not_asked(tables, " ".join(map(str, runs)))
    found = {name: findings(run) for run, name in zip(runs, names, strict=True)}
    return Inspection(names, tables.joined(), tables.missing, found)


def _asked(tables: _Tables, run: Path, name: str, options: Options, console: Console) -> None:
    if options.interference:
        console.print(f"{name}: gradients of each task", highlight=False)
        tables.replace("interference", interference(run, options.rows, console), name)
    if options.leave_out:
        console.print(f"{name}: without {', '.join(options.leave_out)}", highlight=False)
        tables.replace("transfer", transfer(run, options.leave_out, console=console), name)


def _between(tables: _Tables, adapters: Sequence[Adapter]) -> None:
    """phi of each two runs, or of one's branches; and how alike the matrices of all are."""
    for a, b in list(combinations(adapters, 2)) or [(adapters[0], adapters[0])]:
        together = f"{a.name}, {b.name}"
        tables.try_to("subspaces", together, partial(subspaces, a, b, most=DIRECTIONS))
    likeness = initialisation(adapters)
    if likeness.empty:
        tables.missing["likeness"] = "no two matrices of these updates have the same shape"
        return
    tables.add("initialisation", likeness, "")
    tables.add("likeness", summary(likeness), "")


def _plane(tables: _Tables, adapters: Sequence[Adapter], options: Options) -> None:
    """One plane for the A's of all runs, and one for their B's.

    Beside those of several runs, their A's at the start and what training changed in them: what of
    the first picture is there in the second was never learned.
    """
    planes: list[tuple[Matrix, State, str]] = [(m, "trained", m) for m in MATRICES]
    if len(adapters) > 1:
        planes[1:1] = [("A", "start", "A at the start"), ("A", "change", "A, what changed")]
    for matrix, of, title in planes:
        try:
            frame = projection(adapters, matrix, options.method, of=of)
        except ValueError as error:
            tables.missing["projection" if of == "trained" else "likeness"] = str(error)
            continue
        tables.parts.setdefault("projection", []).append(frame.assign(matrix=title))
