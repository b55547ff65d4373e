"""The matrices of every layer on a plane, and how much of their likeness their start explains."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.scatter import MOST_TIPS, Scatter, scatter
from manylora.report.tables import frame_csv, in_order


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A or B: the same points coloured in several ways."""

    matrix: str
    count: int
    plots: list[Scatter]


@dataclass(frozen=True, slots=True)
class StartRow:
    """One matrix in pairs of one kind: (mean, interval) of each of LIKENESS, over the layers."""

    matrix: str
    pair: str
    layers: int
    cells: list[tuple[str, str]]


LIKENESS = {
    "similarity": "after training",
    "at_start": "at the start",
    "of_change": "of what changed",
    "explained": "explained by the start",
    "subspace": "shared directions",
    "subspace_of_change": "of what changed",
}


@dataclass(frozen=True, slots=True)
class ProjectionView:
    """The section."""

    matrices: list[MatrixView]
    csv: str
    headings: list[str]
    start: list[StartRow]
    start_csv: str


def projection_view(found: Inspection) -> ProjectionView | None:
    """The section, or None with neither table."""
    points, start = found.frame("projection"), found.frame("likeness")
    pairs = found.frame("initialisation")
    if points is None and start is None:
        return None
    matrices = [] if points is None else in_order(points["matrix"])
    return ProjectionView(
        [_matrix(points[points["matrix"] == m], m) for m in matrices] if points is not None else [],
        "" if points is None else frame_csv(points),
        list(LIKENESS.values()),
        [] if start is None else _start_rows(start),
        "" if pairs is None else frame_csv(pairs),
    )


def _matrix(points: pd.DataFrame, matrix: str) -> MatrixView:
    """By depth and by kind of layer; by run and by part where there are several."""
    ways = [("depth", "block"), ("module", "kind")]
    ways += [
        (column, column) for column in ("run", "part") if len(set(points[column].tolist())) > 1
    ]
    tips = len(points) * len(ways) <= MOST_TIPS
    labels = [f"{row.run}: {row.layer}, {row.part}" for row in points.itertuples() if tips]
    plots = [scatter(f"{matrix} by {title}", "", points, column, labels) for column, title in ways]
    return MatrixView(matrix, len(points), plots)


def _start_rows(likeness: pd.DataFrame) -> list[StartRow]:
    rows = []
    for (matrix, pair), group in likeness.groupby(["matrix", "pair"], sort=False):
        by_measure = group.set_index("measure")[["mean", "low", "high"]]
        found = [_said(by_measure, name) for name in LIKENESS]
        rows.append(StartRow(str(matrix), str(pair), int(group["layers"].iloc[0]), found))
    return rows


def _said(by_measure: pd.DataFrame, name: str) -> tuple[str, str]:
    mean, low, high = (float(v) for v in by_measure.loc[name])
    if isnan(mean):
        return "–", ""
    percent = name == "explained"
    said = [f"{100 * v:.0f} %" if percent else f"{v:.3f}" for v in (mean, low, high)]
    return said[0], "" if isnan(low) else f"{said[1]} to {said[2]}"
