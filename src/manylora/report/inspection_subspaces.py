"""How alike the directions of two updates are: phi(i, j), over pairs, i and j, and depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.curves import Curve, CurvePlot, curve_plot
from manylora.report.heat import CellMap, HeatTable, cell_map, few, heat_table
from manylora.report.tables import frame_csv, wide

MOST_MAPS = 8  # pairs drawn in full on each side

SIDES = {
    "input": "input side: what the update reads",
    "output": "output side: what it writes",
}


@dataclass(frozen=True, slots=True)
class SideView:
    """One side: all pairs in a table, each pair's phi(i, j), and phi by depth."""

    title: str
    pairs: HeatTable
    maps: list[CellMap]
    left_out: int
    depth: CurvePlot | None


@dataclass(frozen=True, slots=True)
class SubspacesView:
    """The section; directions: k of the phi(k, k) that the tables show."""

    sides: list[SideView]
    directions: int
    csv: str


def subspaces_view(found: Inspection) -> SubspacesView | None:
    """The section, or None without the table of subspaces."""
    phi = found.frame("subspaces")
    if phi is None:
        return None
    k = int(phi.groupby(["left", "right"])["i"].max().min())
    k = min(k, int(phi.groupby(["left", "right"])["j"].max().min()))
    means = phi.groupby(["side", "left", "right", "i", "j"], sort=False)["phi"].mean().reset_index()
    present = [side for side in SIDES if side in set(phi["side"])]
    csv = frame_csv(means)
    if len(found.runs) == 1:
        phi, means = (f.assign(**_without_run(f)) for f in (phi, means))
    return SubspacesView([_side(phi, means, side, k) for side in present], k, csv)


def _without_run(frame: pd.DataFrame) -> dict[str, pd.Series[str]]:
    """The parts alone: a page of one run has said its name."""
    return {side: frame[side].str.replace(r"^.*?: ", "", regex=True) for side in ("left", "right")}


def _side(phi: pd.DataFrame, means: pd.DataFrame, side: str, k: int) -> SideView:
    of_side = means[means["side"] == side]
    at_k = of_side[(of_side["i"] == k) & (of_side["j"] == k)]
    drawn = at_k.sort_values("phi", ascending=False).head(MOST_MAPS)
    pairs = list(drawn[["left", "right"]].itertuples(index=False, name=None))
    tables = {f"{left} | {right}": _map(of_side, left, right) for left, right in pairs}
    tips = few(list(tables.values()))
    return SideView(
        SIDES[side],
        heat_table(
            f"phi({k}, {k}), {SIDES[side]}",
            "mean over layers; 1: the same directions, 0: none shared",
            wide(at_k, "left", "right", "phi").rename_axis(index="update"),
            largest=1.0,
        ),
        [cell_map(name, "i down, j across", table, 1.0, tips) for name, table in tables.items()],
        len(at_k) - len(drawn),
        _depth(phi[(phi["side"] == side) & (phi["i"] == k) & (phi["j"] == k)], pairs, k),
    )


def _map(means: pd.DataFrame, left: str, right: str) -> pd.DataFrame:
    pair = means[(means["left"] == left) & (means["right"] == right)]
    table = pair.pivot(index="i", columns="j", values="phi").sort_index().sort_index(axis=1)
    return cast(pd.DataFrame, table)


def _depth(at_k: pd.DataFrame, pairs: list[tuple[str, str]], k: int) -> CurvePlot | None:
    """phi(k, k) of the most similar pairs over the blocks, mean over the kinds of layer."""
    if len(set(at_k["depth"])) < 2:
        return None
    curves = []
    for place, (left, right) in enumerate(pairs):
        pair = at_k[(at_k["left"] == left) & (at_k["right"] == right)]
        means = pair.groupby("depth")["phi"].mean().sort_index()
        points = [(float(str(d)), float(v)) for d, v in means.items()]
        curves.append(Curve(f"{left} | {right}", place, points))
    note = "mean over kinds of layer"
    return curve_plot(f"phi({k}, {k}) by depth", note, curves, x_title="block", unit=True)
