"""Scatter plots: points grouped by what colours them, as many as an adapter has matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from manylora.report.curves import colour

SHADES = 8  # of depth
MOST_TIPS = 1200


@dataclass(frozen=True, slots=True)
class Dots:
    """The points of one colour as an SVG path of dots (0..1000 both ways)."""

    name: str
    style: str
    path: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """tips: (x in percent, y in percent, what it says)."""

    title: str
    note: str
    groups: list[Dots]
    tips: list[tuple[float, float, str]]


def scatter(
    title: str,
    note: str,
    points: pd.DataFrame,
    by: str,
    labels: Sequence[str] = (),
) -> Scatter:
    """The plot of columns x and y, coloured by column `by`: depth in shades, else in colours."""
    x, y = (_spread_out(points[axis]) for axis in ("x", "y"))
    styles, names = _colours(points[by], by == "depth")
    paths: defaultdict[str, str] = defaultdict(str)
    for across, up, style in zip(x, y, styles, strict=True):
        paths[style] += f"M{1000 * across:.0f} {1000 * (1 - up):.0f}h0"
    tips = [
        (round(100 * a, 1), round(100 * (1 - u), 1), label)
        for a, u, label in zip(x, y, labels, strict=bool(labels))
    ]
    return Scatter(title, note, [Dots(names[s], s, paths[s]) for s in names if s in paths], tips)


def _spread_out(values: pd.Series[float]) -> list[float]:
    """The values between 0.03 and 0.97, so that no dot is cut at the edge."""
    low, high = float(values.min()), float(values.max())
    span = high - low or 1.0
    return [0.03 + 0.94 * (float(v) - low) / span for v in values]


def _colours(values: pd.Series[object], depth: bool) -> tuple[list[str], dict[str, str]]:
    """A class for each value, and what each class stands for."""
    if not depth:
        kinds = list(dict.fromkeys(str(v) for v in values))
        styles = {kind: colour(place) for place, kind in enumerate(kinds)}
        names: defaultdict[str, list[str]] = defaultdict(list)
        for kind in kinds:
            names[styles[kind]].append(kind)
        return [styles[str(v)] for v in values], {s: ", ".join(n) for s, n in names.items()}
    numbers = [int(str(v)) for v in values]
    low, high = min(numbers), max(numbers)
    span = high - low or 1
    placed = [round((SHADES - 1) * (n - low) / span) for n in numbers]
    said: defaultdict[int, list[int]] = defaultdict(list)
    for number, place in zip(numbers, placed, strict=True):
        said[place].append(number)
    names_of = {
        f"d{p}": f"{min(n)}" if min(n) == max(n) else f"{min(n)}–{max(n)}"
        for p, n in sorted(said.items())
    }
    return [f"d{p}" for p in placed], names_of
