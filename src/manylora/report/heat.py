"""Heat maps of the pages: tables whose cells have a colour, and plain cells where they are many.

Two colours in all: one for values from 0 up, and a second, orange against blue, for those below 0.
A cell's opacity is its share of the largest, so that a map reads on a light and on a dark page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import pandas as pd

from manylora.report.plots import csv_link

STRONGEST = 70  # percent: text on the deepest colour stays readable
MOST_TIPS = 900  # cells of a page's map that say their value


@dataclass(frozen=True, slots=True)
class Cell:
    """A value's text, its sign's class ("up", "down" or "plain") and its colour in percent.

    below: what stands under it, in small letters.
    """

    text: str
    style: str
    weight: float
    below: str = ""


@dataclass(frozen=True, slots=True)
class HeatTable:
    """Named rows of cells; key: what the colours mean."""

    title: str
    note: str
    first: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    csv: str


def heat_table(
    title: str,
    note: str,
    values: pd.DataFrame,
    largest: float | None = None,
    digits: int = 2,
) -> HeatTable:
    """The table of `values` (rows and columns named); largest: the value of the deepest colour."""
    most = largest or largest_of(values)
    first = str(values.index.name or "")
    rows = [
        (str(name), [cell(value, most, digits) for value in row])
        for name, row in zip(values.index, values.to_numpy(dtype=float).tolist(), strict=True)
    ]
    header = [first, *map(str, values.columns)]
    table = [
        [str(name), *row]
        for name, row in zip(values.index, values.to_numpy().tolist(), strict=True)
    ]
    return HeatTable(title, note, first, header[1:], rows, csv_link(header, table))


def cell(value: float, most: float, digits: int = 2) -> Cell:
    """One value; what is not a number is a dash without colour."""
    if not isfinite(value):
        return Cell("–", "plain", 0)
    weight = round(STRONGEST * min(abs(value) / most, 1))
    return Cell(f"{value:.{digits}f}", "down" if value < 0 else "up", weight)


def largest_of(values: pd.DataFrame) -> float:
    """The largest absolute value that is a number, 1 where none is above 0."""
    most = float(values.abs().max().max()) if values.size else 0.0
    return most if isfinite(most) and most > 0 else 1.0


@dataclass(frozen=True, slots=True)
class CellMap:
    """Cells without text: (class, opacity, SVG path) a shade; tips: (x, y, what it says)."""

    title: str
    note: str
    columns: int
    rows: int
    shades: list[tuple[str, float, str]]
    tips: list[tuple[int, int, str]]
    row_names: list[str]
    ends: tuple[str, str]


def cell_map(
    title: str,
    note: str,
    values: pd.DataFrame,
    largest: float | None = None,
    tips: bool = True,
    least: float = 0.0,
) -> CellMap:
    """The map of `values`: the first row at the top, the first column at the left.

    least: the value whose cell has no colour.
    """
    most = largest or largest_of(values)
    span = (most - least) or 1.0
    shades: defaultdict[tuple[str, float], str] = defaultdict(str)
    said: list[tuple[int, int, str]] = []
    for y, row in enumerate(values.to_numpy(dtype=float).tolist()):
        for x, value in enumerate(row):
            if not isfinite(value):
                continue
            style = "down" if value < 0 else "up"
            shades[style, round(min((abs(value) - least) / span, 1), 2)] += f"M{x} {y}h1v1h-1z"
            where = f"{_name(values.index.name, values.index[y])}, "
            where += _name(values.columns.name, values.columns[x])
            said.append((x, y, f"{where}: {value:.3g}"))
    columns = [str(name) for name in values.columns]
    return CellMap(
        title,
        note,
        values.shape[1],
        values.shape[0],
        [(style, opacity, path) for (style, opacity), path in sorted(shades.items())],
        said if tips else [],
        [str(name) for name in values.index],
        (columns[0], columns[-1]) if columns else ("", ""),
    )


def _name(axis: object, value: object) -> str:
    return f"{axis} {value}" if axis is not None else str(value)


def few(maps: Sequence[pd.DataFrame]) -> bool:
    """Whether maps of these values have few enough cells for each to say its own."""
    return sum(values.size for values in maps) <= MOST_TIPS
