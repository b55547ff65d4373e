"""Which tasks pull the same parameters in opposite directions, and which are missed by others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from manylora.inspect.conflicts import conflicts, matrix
from manylora.inspect.frames import Inspection
from manylora.inspect.interference import ALL
from manylora.report.curves import Curve, CurvePlot, curve_plot
from manylora.report.heat import HeatTable, heat_table, largest_of
from manylora.report.tables import frame_csv, in_order

NAMED = 5  # pairs named in words


@dataclass(frozen=True, slots=True)
class PartRow:
    """Pairs of tasks over one part: mean cosine, mean conflict, share of the pairs below 0."""

    run: str
    part: str
    cosine: str
    conflict: str
    below: str


@dataclass(frozen=True, slots=True)
class InterferenceView:
    """The section. worst: the pairs that conflict most, in words; more: tables of single parts."""

    tables: list[HeatTable]
    more: list[HeatTable]
    depth: list[CurvePlot]
    worst: list[str]
    parts: list[PartRow]
    csv: str


def interference_view(found: Inspection) -> InterferenceView | None:
    """The section, or None without gradients."""
    cosines = found.frame("interference")
    if cosines is None:
        return None
    several = len(found.runs) > 1
    tables, rows, worst = [], [], []
    for run in in_order(cosines["run"]):
        of_run = cosines[cosines["run"] == run]
        for part in in_order(of_run["part"]):
            of_part = of_run[of_run["part"] == part]
            title = f"{run}: {_part(part)}" if several else _part(part).capitalize()
            tables.append((part, title, matrix(of_part, part)))
            pairs = conflicts(of_part, part)
            rows.append(_row(run, part, pairs))
            if part == ALL:
                worst.append(pairs)
    most = _largest([table for _, _, table in tables])
    drawn = [(part, _table(title, table, most)) for part, title, table in tables]
    return InterferenceView(
        [table for part, table in drawn if part == ALL],
        [table for part, table in drawn if part != ALL],
        _depth(cosines, found.runs),
        _worst(pd.concat(worst), several),
        rows,
        frame_csv(_by_part(cosines)),
    )


def _part(part: str) -> str:
    return "all trained parameters" if part == ALL else part


def _off_diagonal(table: pd.DataFrame) -> pd.DataFrame:
    return table.mask(np.eye(len(table), dtype=bool))


def _largest(tables: list[pd.DataFrame]) -> float:
    return max((largest_of(_off_diagonal(table)) for table in tables), default=1.0)


def _table(title: str, table: pd.DataFrame, most: float) -> HeatTable:
    note = f"cosine of the tasks' gradients over all layers; deepest colour: {most:.2f}"
    return heat_table(title, note, _off_diagonal(table), largest=most)


def _row(run: str, part: str, pairs: pd.DataFrame) -> PartRow:
    known = pairs.dropna(subset=["cosine"])
    if known.empty:
        return PartRow(run, _part(part), "apart", "0", "0 %")
    return PartRow(
        run,
        _part(part),
        f"{float(known['cosine'].mean()):+.3f}",
        f"{float(known['conflict'].mean()):.3f}",
        f"{100 * float((known['cosine'] < 0).mean()):.0f} %",
    )


def _worst(pairs: pd.DataFrame, several: bool) -> list[str]:
    rows = pairs[pairs["cosine"] < 0].sort_values("cosine").head(NAMED)
    return [
        f"{row.task} against {row.other}: {row.cosine:+.2f}{f' ({row.run})' if several else ''}"
        for row in rows.itertuples()
    ]


def _by_part(cosines: pd.DataFrame) -> pd.DataFrame:
    """Means over the kinds of layer of a block, each pair once: small enough for a page."""
    keys = ["run", "depth", "part", "task", "other"]
    return _between(cosines).groupby(keys, sort=False)["cosine"].mean().reset_index()


def _between(rows: pd.DataFrame) -> pd.DataFrame:
    """Each pair once."""
    return rows[rows["task"].astype(str) < rows["other"].astype(str)]


def _depth(cosines: pd.DataFrame, runs: list[str]) -> list[CurvePlot]:
    """The mean over pairs of different tasks, by block, one curve a part; one plot a run."""
    plots = []
    pairs = _between(cosines)
    for run in runs:
        rows = pairs[pairs["run"] == run]
        if len(set(rows["depth"])) < 2:
            continue
        curves = []
        for place, part in enumerate(in_order(rows["part"])):
            means = rows[rows["part"] == part].groupby("depth")["cosine"].mean().sort_index()
            points = [(float(str(d)), float(v)) for d, v in means.items()]
            curves.append(Curve(_part(part), place, points))
        note = "cosine by block; every pair of tasks and every layer counts alike"
        plots.append(curve_plot(run if len(runs) > 1 else "By depth", note, curves, "block"))
    return plots
