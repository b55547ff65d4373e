"""The pages' plots as geometry; their templates draw them as SVG.

Horizontal places are shares of the width, so that a plot fits a phone and a desk with its text at
one size: dot plots in percent, lines in a nested SVG that stretches (0..1000 both ways). Vertical
places of text and dots are pixels.
"""

from __future__ import annotations

import csv
import gzip
import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from urllib.parse import quote

from matplotlib.ticker import MaxNLocator

from manylora.report.files import Interval

Point = tuple[float, float]

ROW_HEIGHT = 44
MAX_POINTS = 300
MAX_POINTS_OF_ALL_TASKS = 12_000
LONGEST_CSV = 60_000  # characters; percent-encoding makes them up to three times as many


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis with round ticks."""

    low: float
    high: float
    ticks: list[float]

    @staticmethod
    def over(values: Iterable[float], bins: int = 4, zero: bool = False) -> Axis:
        """The axis that spans the values, from 0 if asked, ending on a tick at both ends."""
        finite = [value for value in values if isfinite(value)] or [0.0, 1.0]
        low = 0.0 if zero else min(finite)
        high = max(finite) if max(finite) > low else low + 1.0
        ticks = [float(tick) for tick in MaxNLocator(nbins=bins).tick_values(low, high)]
        if zero:
            ticks = [tick for tick in ticks if tick >= 0]
        return Axis(ticks[0], ticks[-1], ticks)

    @staticmethod
    def of_steps(last: int, bins: int = 4, first: int = 0) -> Axis:
        """The first step to the last, and no further."""
        last = max(last, first + 1)
        ticks = MaxNLocator(nbins=bins, integer=True).tick_values(first, last)
        return Axis(float(first), float(last), [float(t) for t in ticks if first <= t <= last])

    def share(self, value: float) -> float:
        """Where the value lies between the axis's ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def labels(self, size: float, flip: bool = False) -> list[tuple[float, str]]:
        """(place, text) of each tick on a line of this size; flip puts the low end at `size`."""
        shares = [1 - self.share(t) if flip else self.share(t) for t in self.ticks]
        return [
            (round(s * size, 2), f"{tick:.6g}") for s, tick in zip(shares, self.ticks, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Dot:
    """A mean with its interval, in percent of the plot's width; `label` says the numbers."""

    mean: float
    low: float
    high: float
    label: str


@dataclass(frozen=True, slots=True)
class DotRow:
    """One task of a dot plot."""

    task: str
    top: int
    before: Dot | None
    after: Dot | None


@dataclass(frozen=True, slots=True)
class DotPlot:
    """Before and after by task, for one metric."""

    height: int
    rows: list[DotRow]
    ticks: list[tuple[float, str]]
    csv: str


def number(value: float) -> str:
    """A score as the page prints it."""
    return f"{value:.3f}"


def dot_plot(rows: Sequence[tuple[str, Interval | None, Interval | None]]) -> DotPlot:
    """The plot of (task, before, after) rows."""
    present = [interval for _, *pair in rows for interval in pair if interval is not None]
    axis = Axis.over(value for interval in present for value in interval)

    def dot(interval: Interval | None) -> Dot | None:
        if interval is None or not all(map(isfinite, interval)):
            return None
        mean, low, high = (round(100 * axis.share(value), 2) for value in interval)
        mean_text, low_text, high_text = map(number, interval)
        return Dot(mean, low, high, f"{mean_text} (95 %: {low_text} to {high_text})")

    blank = ("", "", "")
    header = [f"{when}_{part}" for when in ("before", "after") for part in ("mean", "low", "high")]
    return DotPlot(
        height=ROW_HEIGHT * len(rows),
        rows=[
            DotRow(task, ROW_HEIGHT * i, dot(before), dot(after))
            for i, (task, before, after) in enumerate(rows)
        ],
        ticks=axis.labels(100),
        csv=csv_link(["task", *header], [[t, *(b or blank), *(a or blank)] for t, b, a in rows]),
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """A circle at a point of a line plot; `label` says what it is."""

    style: str
    at: Point
    radius: int
    label: str


@dataclass(frozen=True, slots=True)
class LinePlot:
    """Lines over steps: (CSS class, SVG polyline points); marks: at (percent, pixels)."""

    title: str
    height: int
    lines: list[tuple[str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left_out: int
    marks: list[Mark]


def line_plot(
    title: str,
    lines: Sequence[tuple[str, Sequence[Point]]],
    y: Axis,
    last_step: int,
    height: int = 220,
    x_bins: int = 4,
    first_step: int = 0,
    marks: Sequence[Mark] = (),
) -> LinePlot:
    """The plot of (CSS class, points) lines; points that are not finite are counted, not drawn."""
    x = Axis.of_steps(last_step, x_bins, first_step)

    def draw(points: Sequence[Point]) -> str:
        return " ".join(
            f"{1000 * x.share(step):.0f},{1000 * (1 - y.share(value)):.0f}"
            for step, value in points
            if isfinite(value)
        )

    def place(point: Point) -> Point:
        across, up = x.share(point[0]), y.share(point[1])
        return round(100 * across, 2), round(height * (1 - up), 2)

    return LinePlot(
        title,
        height,
        [(style, draw(points)) for style, points in lines],
        x.labels(100),
        y.labels(height, flip=True),
        sum(not isfinite(value) for _, points in lines for _, value in points),
        [replace(mark, at=place(mark.at)) for mark in marks if isfinite(mark.at[1])],
    )


def points_a_bin(points: int, series: int = 1) -> int:
    """How many points are drawn as one, so that a long run's page stays small."""
    most = max(2, min(MAX_POINTS, MAX_POINTS_OF_ALL_TASKS // max(series, 1)))
    return -(-points // most)


def thin(points: Sequence[Point], size: int) -> list[Point]:
    """The mean of every `size` neighbouring points."""
    bins = (points[start : start + size] for start in range(0, len(points), max(size, 1)))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def csv_link(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A data: address that holds the rows as CSV, a long table's gzipped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    if text.tell() <= LONGEST_CSV:
        return "data:text/csv;charset=utf-8," + quote(text.getvalue())
    packed = gzip.compress(text.getvalue().encode(), mtime=0)
    return "data:application/gzip;base64," + b64encode(packed).decode()
