"""How much of each update lies in its largest singular values: curves, histograms, a table."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.curves import LABELLED, Curve, CurvePlot, colour, curve_plot
from manylora.report.heat import CellMap, cell_map, few
from manylora.report.histograms import Histograms, histograms
from manylora.report.tables import by_depth, family, frame_csv, in_order

# Column, title, what it says, whether it lies between 0 and 1.
MEASURES = (
    ("top1", "Largest value's share", "1: one direction does everything", True),
    ("entropy", "Entropy", "higher: spread over more directions", False),
    ("effective_rank", "Effective rank", "how many directions are in use", False),
    ("gini", "Gini", "0: all values alike; 1: one does everything", True),
)


@dataclass(frozen=True, slots=True)
class PartRow:
    """Medians over the layers of one part of one run."""

    run: str
    part: str
    layers: int
    values: list[str]


@dataclass(frozen=True, slots=True)
class SpectraView:
    """The section. `more`: histograms of the parts that are one a task or cluster."""

    said: list[str]
    curves: list[CurvePlot]
    curves_csv: str
    shares: list[Histograms]
    more: list[Histograms]
    depth: list[CellMap]
    headings: tuple[str, ...]
    rows: list[PartRow]
    csv: str


BANDS = 4  # more curves than this are drawn without their bands
HEADINGS = ("norm", "top 1", "top quarter", "entropy", "effective rank", "Gini")
_COLUMNS = ("frobenius", "top1", "top_quarter", "entropy", "effective_rank", "gini")


def spectra_view(found: Inspection) -> SpectraView | None:
    """The section, or None without the table of spectra."""
    spectra, values = found.frame("spectra"), found.frame("singular_values")
    if spectra is None:
        return None
    curves = [] if values is None else _relative(values)
    several = spectra[[family(part) in ("tasks", "clusters") for part in spectra["part"]]]
    others = spectra.drop(several.index)
    if others.empty:
        several, others = others, several
    return SpectraView(
        [_said(spectra[spectra["run"] == run], run, len(found.runs) > 1) for run in found.runs],
        _curve_plots(curves, found.runs),
        _curves_csv(curves),
        _histograms(others, found.runs),
        _histograms(several, found.runs) if not several.empty else [],
        _depth_maps(spectra, found.runs),
        HEADINGS,
        _rows(spectra),
        frame_csv(spectra),
    )


@dataclass(frozen=True, slots=True)
class _Quartiles:
    """Of one part, over its layers: index, median, low and high quartile of value / largest."""

    run: str
    part: str
    table: pd.DataFrame


def _relative(values: pd.DataFrame) -> list[_Quartiles]:
    """Each part's values over the largest of their layer, by index (the first is 1)."""
    of_part = ["run", "layer", "part"]
    shown = values.assign(index=values["index"] - values["index"].min() + 1)
    largest = shown.groupby(of_part)["value"].transform("max")
    shown = shown.assign(share=shown["value"] / largest.where(largest > 0))
    found = []
    for (run, part), rows in shown.groupby(["run", "part"], sort=False):
        quantiles = rows.groupby("index")["share"].quantile([0.5, 0.25, 0.75]).unstack()
        table = quantiles.reset_index().set_axis(["index", "median", "low", "high"], axis=1)
        found.append(_Quartiles(str(run), str(part), table.dropna()))
    return found


def _curve_plots(parts: list[_Quartiles], runs: list[str]) -> list[CurvePlot]:
    """One plot a run and family of parts; the whole updates of several runs share one."""
    several = len(runs) > 1
    groups: dict[str, list[tuple[str, _Quartiles]]] = {}
    for one in parts:
        kind = family(one.part)
        if kind == "whole":
            title, name = "Whole update", one.run if several else one.part
        else:
            title = f"{one.run}: {kind}" if several else kind.capitalize()
            name = _short(one.part)
        groups.setdefault(title, []).append((name, one))
    return [_curve_plot(title, lines) for title, lines in groups.items()]


def _curve_plot(title: str, lines: list[tuple[str, _Quartiles]]) -> CurvePlot:
    bands = len(lines) <= BANDS
    hint = "; point at a curve for its name" if len(lines) > LABELLED else ""
    return curve_plot(
        title,
        f"median over layers{'; band: the middle half' if bands else ''}{hint}",
        [
            Curve(name, place, _points(one), _band(one) if bands else ())
            for place, (name, one) in enumerate(lines)
        ],
        x_title="index of the singular value",
        log=True,
    )


def _short(part: str) -> str:
    """A task's or cluster's own name: the plot says what it is one of."""
    return part.split(" ", 1)[1] if family(part) in ("tasks", "clusters") else part


def _points(one: _Quartiles) -> list[tuple[float, float]]:
    return [(float(i), float(m)) for i, m in one.table[["index", "median"]].to_numpy().tolist()]


def _band(one: _Quartiles) -> list[tuple[float, float, float]]:
    columns = one.table[["index", "low", "high"]].to_numpy().tolist()
    return [(float(i), float(low), float(high)) for i, low, high in columns]


def _curves_csv(parts: list[_Quartiles]) -> str:
    tables = [one.table.assign(run=one.run, part=one.part) for one in parts]
    columns = ["run", "part", "index", "median", "low", "high"]
    return frame_csv(pd.concat(tables) if tables else pd.DataFrame(columns=columns), columns)


def _histograms(spectra: pd.DataFrame, runs: list[str]) -> list[Histograms]:
    plots = []
    for column, title, note, unit in MEASURES:
        rows = [
            (
                str(part) if len(runs) == 1 else f"{run}: {part}",
                colour(runs.index(str(run))),
                [float(value) for value in group[column]],
            )
            for (run, part), group in spectra.groupby(["run", "part"], sort=False)
        ]
        plots.append(histograms(title, note, rows, unit))
    return plots


def _depth_maps(spectra: pd.DataFrame, runs: list[str]) -> list[CellMap]:
    """Entropy by kind of layer and depth, of each run's first part; one scale for all."""
    tables = {}
    for run in runs:
        rows = spectra[spectra["run"] == run]
        if len(set(rows["depth"])) > 1:
            part = rows["part"].iloc[0]
            tables[f"{run}, {part}" if len(runs) > 1 else part.capitalize()] = by_depth(
                rows[rows["part"] == part], "entropy"
            )
    most = max((float(t.max().max()) for t in tables.values()), default=1.0)
    least = min((float(t.min().min()) for t in tables.values()), default=0.0)
    tips = few(list(tables.values()))
    note = f"blocks from left to right; palest {least:.2f}, deepest {most:.2f} nats"
    return [cell_map(name, note, t, most, tips, least) for name, t in tables.items()]


def _said(spectra: pd.DataFrame, run: str, several: bool) -> str:
    """The median layer of a run's first part, in a sentence."""
    if spectra.empty:
        return f"{run} has no spectra."
    part = str(spectra["part"].iloc[0])
    middle = spectra[spectra["part"] == part].median(numeric_only=True)
    if not middle["frobenius"]:
        return f"{run if several else part}: the update is zero, as before training."
    return (
        f"{run + ', ' if several else ''}{part}: the median layer spreads over "
        f"{middle['effective_rank']:.1f} of {middle['rank']:.0f} directions, and the strongest has "
        f"{100 * middle['top1']:.0f} % of the sum."
    )


def _rows(spectra: pd.DataFrame) -> list[PartRow]:
    rows = []
    for run in in_order(spectra["run"]):
        of_run = spectra[spectra["run"] == run]
        for part in in_order(of_run["part"]):
            group = of_run[of_run["part"] == part]
            middle = [f"{float(group[column].median()):.3g}" for column in _COLUMNS]
            rows.append(PartRow(run, part, len(group), middle))
    return rows
