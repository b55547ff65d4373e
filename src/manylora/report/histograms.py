"""Histograms under one another on one axis: one row a name, its median marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

import numpy as np

from manylora.report.comparison_plots import clipped
from manylora.report.plots import Axis

ROW = 44
BARS = 24


@dataclass(frozen=True, slots=True)
class HistogramRow:
    """One name's bars as an SVG path (0..1000 across, 0..1000 down); median: percent."""

    name: str
    style: str
    top: int
    path: str
    median: float
    label: str


@dataclass(frozen=True, slots=True)
class Histograms:
    """Rows of bars over the same axis."""

    title: str
    note: str
    height: int
    row: int
    rows: list[HistogramRow]
    ticks: list[tuple[float, str]]


def histograms(
    title: str,
    note: str,
    rows: Sequence[tuple[str, str, Sequence[float]]],
    unit: bool = False,
) -> Histograms:
    """The plot of (name, CSS class, values) rows; unit: the axis is 0 to 1."""
    finite = [(name, css, [v for v in values if isfinite(v)]) for name, css, values in rows]
    every = [v for _, _, values in finite for v in values]
    axis = Axis.over([0.0, 1.0] if unit else every)
    drawn = []
    for place, (name, css, values) in enumerate(row for row in finite if row[2]):
        middle = median(values)
        label = (
            f"{name}: median {middle:.3g}, from {min(values):.3g} to {max(values):.3g}, "
            f"{len(values)} layers"
        )
        drawn.append(
            HistogramRow(
                clipped(name),
                css,
                ROW * place,
                _bars(values, axis),
                round(100 * axis.share(middle), 2),
                label,
            )
        )
    return Histograms(title, note, ROW * len(drawn), ROW, drawn, axis.labels(100))


def _bars(values: Sequence[float], axis: Axis) -> str:
    """The outline of the bars, the highest as high as the row."""
    counts, _ = np.histogram(values, bins=BARS, range=(axis.low, axis.high))
    most, width = max(int(counts.max()), 1), 1000 / BARS
    return "".join(
        f"M{i * width:.0f} 1000v-{1000 * count / most:.0f}h{width * 0.9:.0f}V1000z"
        for i, count in enumerate(counts.tolist())
        if count
    )
