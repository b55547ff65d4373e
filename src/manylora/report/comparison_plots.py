"""The plots of a comparison as geometry: dots by method, rate curves, parameters against score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, log10
from statistics import median

from matplotlib.ticker import LogLocator

from manylora.comparison.result import Interval, MethodInfo
from manylora.report.plots import Axis, Dot, LinePlot, Mark, Point, csv_link

ROW = 22
LABEL = 15  # pixels between the labels of neighbouring points
RATE_HEIGHT = 130
LONGEST_NAME = 26


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method's interval; style: its colour's class; y: pixels from the top."""

    name: str
    style: str
    y: int
    dot: Dot


@dataclass(frozen=True, slots=True)
class MethodPlot:
    """Methods under one another on one axis; guide: percent of the dashed line, None: no line.

    margin: pixels for the names.
    """

    title: str
    note: str
    height: int
    margin: int
    rows: list[MethodRow]
    ticks: list[tuple[float, str]]
    guide: float | None
    csv: str


def method_plot(
    title: str,
    note: str,
    rows: Sequence[tuple[str, str, Interval]],
    guide: float | None,
    digits: int,
    bins: int = 3,
) -> MethodPlot:
    """The plot of (method, style, interval) rows; guide: where the dashed line stands."""
    values = [value for _, _, interval in rows for value in interval]
    axis = Axis.over([*values, *([] if guide is None else [guide])], bins)

    def dot(interval: Interval) -> Dot:
        mean, low, high = (round(100 * axis.share(value), 2) for value in interval)
        said = [f"{value:.{digits}f}" for value in interval]
        return Dot(mean, low, high, f"{said[0]} (95 %: {said[1]} to {said[2]})")

    return MethodPlot(
        title,
        note,
        ROW * len(rows),
        margin([name for name, _, _ in rows]),
        [
            MethodRow(clipped(name), style, ROW * place + ROW // 2, dot(interval))
            for place, (name, style, interval) in enumerate(rows)
        ],
        axis.labels(100),
        None if guide is None else round(100 * axis.share(guide), 2),
        csv_link(["method", "mean", "low", "high"], [[name, *value] for name, _, value in rows]),
    )


def clipped(name: str) -> str:
    """The name, or its beginning where it is longer than a plot has room for."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def margin(names: Sequence[str]) -> int:
    """Pixels that the longest of these names takes, with a sign before it."""
    return 32 + 7 * max(min(len(name), LONGEST_NAME) for name in names)


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic axis between two positive values, with a tick at 1, 2 and 5 where few fit."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where the value lies, 0 to 100."""
        span = log10(self.high) - log10(self.low)
        return round(100 * (log10(value) - log10(self.low)) / span, 2)

    def ticks(self) -> list[tuple[float, str]]:
        """(percent, text) of each tick between the ends."""
        tens = LogLocator(base=10).tick_values(self.low, self.high)
        inside = [float(v) for v in tens if self.low <= v <= self.high]
        if len(inside) < 2:
            finer = LogLocator(base=10, subs=(1, 2, 5)).tick_values(self.low, self.high)
            inside = [float(v) for v in finer if self.low <= v <= self.high]
        if len(inside) < 2:
            inside = [
                v for v in Axis.over([self.low, self.high]).ticks if self.low <= v <= self.high
            ]
        return [(self.percent(value), short(value)) for value in inside]


def short(value: float) -> str:
    """A tick's number: 5M, 200K, 0.001."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@dataclass(frozen=True, slots=True)
class RatePlots:
    """One plot a method, all on one scale; cap: nll above it is drawn at the top edge."""

    plots: list[tuple[LinePlot, str]]
    cap: float | None
    csv: str


def rate_plots(methods: Sequence[MethodInfo]) -> RatePlots | None:
    """nll over the learning rate, each method before all the others; None without two rates."""
    tried = {m.name: sorted((p.lr, p.nll) for p in m.rates) for m in methods if m.rates}
    rates = [lr for points in tried.values() for lr, _ in points]
    values = [nll for points in tried.values() for _, nll in points if isfinite(nll)]
    if len(set(rates)) < 2 or not values:
        return None
    finite = [[nll for _, nll in points if isfinite(nll)] for points in tried.values()]
    # A rate far too high has an nll that would leave the other curves flat.
    cap = max(median(nlls) for nlls in finite if nlls)
    cap += 0.5 * (cap - min(values))
    y = Axis.over([min(nll, cap) for nll in values], bins=3)
    x = LogAxis(min(rates), max(rates))
    place = {name: _places(points, x, y) for name, points in tried.items()}
    plots = []
    for method in methods:
        if method.name not in place:
            continue
        others = [("total", place[name]) for name in place if name != method.name]
        lines = [*others, ("line", place[method.name])]
        plots.append((_rate_plot(method, lines, x, y), _best(method)))
    rows = [[m.name, p.lr, p.nll, p.correct] for m in methods for p in m.rates]
    above = y.high if max(values) > y.high else None
    return RatePlots(plots, above, csv_link(["method", "lr", "nll", "correct"], rows))


def _best(method: MethodInfo) -> str:
    edge = ", at the edge" if method.at_edge else ""
    return "" if method.best_lr is None else f"{method.best_lr:.3g}{edge}"


def _places(points: Sequence[Point], x: LogAxis, y: Axis) -> list[Point]:
    """The points in percent of the plot, those above its top on the top edge."""
    return [
        (x.percent(lr), 100 * (1 - min(y.share(nll), 1))) for lr, nll in points if isfinite(nll)
    ]


def _rate_plot(
    method: MethodInfo, lines: Sequence[tuple[str, list[Point]]], x: LogAxis, y: Axis
) -> LinePlot:
    marks = []
    for point in method.rates:
        if not isfinite(point.nll):
            continue
        best = point.lr == method.best_lr
        across, down = _places([(point.lr, point.nll)], x, y)[0]
        label = f"{'best: ' if best else ''}{point.lr:.3g}: {point.nll:.4g}"
        at = across, round(RATE_HEIGHT * down / 100, 2)
        marks.append(Mark("after" if best else "at", at, 5 if best else 3, label))
    return LinePlot(
        method.name,
        RATE_HEIGHT,
        [(css, " ".join(f"{10 * a:.0f},{10 * d:.0f}" for a, d in points)) for css, points in lines],
        x.ticks(),
        y.labels(RATE_HEIGHT, flip=True),
        sum(not isfinite(point.nll) for point in method.rates),
        marks,
    )


@dataclass(frozen=True, slots=True)
class SizePoint:
    """A method at its parameters: x in percent, the rest in pixels; name_y: its label's."""

    name: str
    style: str
    x: float
    y: float
    low: float
    high: float
    name_y: float
    label: str


@dataclass(frozen=True, slots=True)
class SizePlot:
    """Score over trained parameters; budget: percent; margin: pixels for the names."""

    height: int
    margin: int
    points: list[SizePoint]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    budget: float
    csv: str


def size_plot(
    rows: Sequence[tuple[str, str, int, Interval]], budget: int, least_height: int = 240
) -> SizePlot:
    """The plot of (method, style, parameters, score) rows, their labels beside one another."""
    height = max(least_height, LABEL * (len(rows) + 1))
    sizes = [budget, *(max(params, 1) for _, _, params, _ in rows)]
    x = LogAxis(min(sizes) / 1.3, max(sizes) * 1.3)
    y = Axis.over([value for *_, interval in rows for value in interval])

    def down(value: float) -> float:
        return round(height * (1 - y.share(value)), 1)

    names = spread([down(interval[0]) for *_, interval in rows], height)
    points = []
    for (name, style, params, interval), name_y in zip(rows, names, strict=True):
        mean, low, high = interval
        label = f"{name}: {params:,} parameters, {mean:.3f} (95 %: {low:.3f} to {high:.3f})"
        points.append(
            SizePoint(
                clipped(name),
                style,
                x.percent(max(params, 1)),
                down(mean),
                down(low),
                down(high),
                name_y,
                label,
            )
        )
    header = ["method", "params", "mean", "low", "high"]
    csv = csv_link(header, [[name, params, *interval] for name, _, params, interval in rows])
    return SizePlot(
        height,
        margin([name for name, *_ in rows]),
        points,
        x.ticks(),
        y.labels(height, flip=True),
        x.percent(budget),
        csv,
    )


def spread(places: Sequence[float], height: float) -> list[float]:
    """The places, moved as little as lets labels stand under one another within the height."""
    found = list(places)
    order = sorted(range(len(found)), key=found.__getitem__)
    for above, below in pairwise(order):
        found[below] = max(found[below], found[above] + LABEL)
    limit = height
    for place in reversed(order):
        found[place] = round(min(found[place], limit), 1)
        limit = found[place] - LABEL
    return found
