"""Named curves with bands over a linear or a logarithmic axis, each named at its right end.

Places as in `plots`: across in percent (lines: 0 to 1000 in an SVG that stretches), down in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from manylora.report.comparison_plots import LogAxis, spread
from manylora.report.plots import Axis

Point = tuple[float, float]
Range = tuple[float, float, float]

COLOURS = 8
LABELLED = 8  # more curves than this are named by their tooltips alone
LONGEST_LABEL = 18
DECADES = 6  # of a logarithmic axis: what lies further below its top is drawn at the bottom


@dataclass(frozen=True, slots=True)
class Curve:
    """points: (x, y); band: (x, low, high); colour: its place in the page's palette."""

    name: str
    colour: int
    points: Sequence[Point]
    band: Sequence[Range] = ()


@dataclass(frozen=True, slots=True)
class DrawnCurve:
    """A curve as SVG points; label_y: where its name stands, None: only a tooltip has it."""

    name: str
    label: str
    style: str
    points: str
    band: str
    end_y: float
    label_y: float | None


@dataclass(frozen=True, slots=True)
class CurvePlot:
    """Curves on one pair of axes; margin: pixels on the right for their names."""

    title: str
    note: str
    x_title: str
    height: int
    margin: int
    curves: list[DrawnCurve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def colour(place: int) -> str:
    """The class of the palette's colour at this place; after the last the first comes again."""
    return f"k{place % COLOURS}"


def curve_plot(
    title: str,
    note: str,
    curves: Sequence[Curve],
    x_title: str = "",
    log: bool = False,
    height: int = 220,
    zero: bool = False,
    unit: bool = False,
) -> CurvePlot:
    """The plot of these curves; values that are not finite (log: not above 0) break nothing.

    zero: the axis begins at 0; unit: it is 0 to 1.
    """
    values = [y for c in curves for _, y in c.points] + [
        v for c in curves for r in c.band for v in r[1:]
    ]
    xs = [x for c in curves for x, _ in c.points] or [0.0, 1.0]
    x = Axis.of_steps(int(max(xs)), first=int(min(xs)))
    y = _LogDown(values) if log else _LinearDown([0.0, 1.0] if unit else values, zero)
    drawn = [_drawn(curve, x, y, height) for curve in curves]
    labelled = [d for d in drawn if d.points] if 1 < len(curves) <= LABELLED else []
    places = spread([d.end_y for d in labelled], height) if labelled else []
    at = {d.name: place for d, place in zip(labelled, places, strict=True)}
    return CurvePlot(
        title,
        note,
        x_title,
        height,
        18 + 7 * max((len(d.label) for d in labelled), default=0),
        [replace(d, label_y=at.get(d.name)) for d in drawn],
        x.labels(100),
        y.labels(height),
    )


class _LinearDown:
    def __init__(self, values: Sequence[float], zero: bool) -> None:
        self.axis = Axis.over(values, zero=zero and all(v >= 0 for v in values if isfinite(v)))

    def share(self, value: float) -> float | None:
        return 1 - self.axis.share(value) if isfinite(value) else None

    def labels(self, height: int) -> list[tuple[float, str]]:
        return self.axis.labels(height, flip=True)


class _LogDown:
    def __init__(self, values: Sequence[float]) -> None:
        positive = [v for v in values if isfinite(v) and v > 0] or [0.1, 1.0]
        high = max(positive)
        low = max(min(positive), high / 10**DECADES)
        self.axis = LogAxis(low if low < high else high / 10, high)

    def share(self, value: float) -> float | None:
        if not isfinite(value) or value < 0:
            return None
        return 1 - self.axis.percent(max(value, self.axis.low)) / 100

    def labels(self, height: int) -> list[tuple[float, str]]:
        return [(round(height * (1 - p / 100), 1), text) for p, text in self.axis.ticks()]


def _drawn(curve: Curve, x: Axis, y: _LinearDown | _LogDown, height: int) -> DrawnCurve:
    placed = [(x.share(a), y.share(b)) for a, b in curve.points]
    line = [(across, down) for across, down in placed if down is not None]
    edge = [(x.share(a), y.share(low), y.share(high)) for a, low, high in curve.band]
    upper = [(a, high) for a, low, high in edge if low is not None and high is not None]
    lower = [(a, low) for a, low, high in edge if low is not None and high is not None]
    return DrawnCurve(
        curve.name,
        curve.name if len(curve.name) <= LONGEST_LABEL else curve.name[: LONGEST_LABEL - 1] + "…",
        colour(curve.colour),
        _points(line),
        _points([*upper, *reversed(lower)]),
        round(height * line[-1][1], 1) if line else 0.0,
        None,
    )


def _points(places: Sequence[Point]) -> str:
    return " ".join(f"{1000 * across:.0f},{1000 * down:.0f}" for across, down in places)
