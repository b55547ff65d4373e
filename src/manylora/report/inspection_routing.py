"""Who uses which branch: usage, what a branch tells of the task, entropies, examples, selectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.heat import CellMap, HeatTable, cell_map, few, heat_table
from manylora.report.histograms import Histograms, histograms
from manylora.report.inspection_tokens import TokensView, tokens_view
from manylora.report.tables import by_depth, frame_csv, wide


@dataclass(frozen=True, slots=True)
class RunRouting:
    """One run: branches by task, branch by layer, information and entropy."""

    run: str
    tasks: HeatTable | None
    layers: list[CellMap]
    information: CellMap | None
    said: str
    entropy: HeatTable | None


@dataclass(frozen=True, slots=True)
class RoutingView:
    """The section."""

    runs: list[RunRouting]
    tokens: TokensView | None
    usage_csv: str
    information_csv: str
    entropy_csv: str


def inspected_routing(found: Inspection) -> RoutingView | None:
    """The section, or None where no run has a router."""
    names = ("usage", "information", "entropy")
    frames = {name: frame for name in names if (frame := found.frame(name)) is not None}
    tokens = tokens_view(found)
    if not frames and tokens is None:
        return None
    runs = [run for run in found.runs if any(run in set(f["run"]) for f in frames.values())]
    most = _most_of_layers(frames["usage"]) if "usage" in frames else 1.0
    return RoutingView(
        [_of_run(run, _rows_of(frames, run), most) for run in runs],
        tokens,
        _usage_csv(frames.get("usage")),
        frame_csv(frames["information"]) if "information" in frames else "",
        frame_csv(frames["entropy"]) if "entropy" in frames else "",
    )


def _rows_of(frames: dict[str, pd.DataFrame], run: str) -> dict[str, pd.DataFrame]:
    rows = {name: frame[frame["run"] == run] for name, frame in frames.items()}
    return {name: frame for name, frame in rows.items() if not frame.empty}


def _of_run(run: str, frames: dict[str, pd.DataFrame], most: float) -> RunRouting:
    usage, information, entropy = (frames.get(n) for n in ("usage", "information", "entropy"))
    return RunRouting(
        run,
        None if usage is None else _by_task(usage),
        [] if usage is None else _by_layer(usage, most),
        None if information is None else _information(information),
        "" if information is None else _said(information),
        None if entropy is None else _entropy(entropy, usage),
    )


def _by_task(usage: pd.DataFrame) -> HeatTable:
    table = wide(usage, "task", "branch", "weight").rename(columns=lambda b: f"branch {b}")
    return heat_table("By task", "mean routing weight, mean over layers", table, digits=3)


def _most_of_layers(usage: pd.DataFrame) -> float:
    means = usage.groupby(["run", "layer", "branch"])["weight"].mean()
    return float(means.max()) or 1.0


def _by_layer(usage: pd.DataFrame, most: float) -> list[CellMap]:
    """One strip a kind of layer: branches down, blocks across, mean over tasks."""
    tables = {}
    for module, rows in usage.groupby("module", sort=False):
        means = rows.groupby(["branch", "depth"])["weight"].mean().unstack("depth")
        tables[str(module)] = means.sort_index().sort_index(axis=1)
    tips = few(list(tables.values()))
    return [cell_map(name, "", table, most, tips) for name, table in tables.items()]


def _information(information: pd.DataFrame) -> CellMap:
    most = max(float(information["nats"].max()), 1e-12)
    note = f"block from left to right; the deepest colour is {most:.3g} nats, none is 0"
    table = by_depth(information, "nats")
    return cell_map("What the branch tells of the task", note, table, most, few([table]))


def _said(information: pd.DataFrame) -> str:
    best = information.sort_values("nats", ascending=False).iloc[0]
    nats, share = float(information["nats"].mean()), float(information["share"].mean())
    return (
        f"Mean over layers: {nats:.3g} nats ({100 * share:.1f} % of what there is to know about "
        f"the task); most in {best['layer']}: {float(best['nats']):.3g} nats."
    )


def _entropy(entropy: pd.DataFrame, usage: pd.DataFrame | None) -> HeatTable:
    columns = {"of_mean": "of the mean weights", "mean_of_tokens": "mean of the tokens' own"}
    table = entropy.groupby("task", sort=False)[list(columns)].mean().rename(columns=columns)
    branches = 1 if usage is None else int(usage["branch"].nunique())
    note = f"nats, mean over layers; at most log {branches} = {log(branches):.2f}"
    return heat_table("Entropy", note if branches > 1 else "nats, mean over layers", table)


def _usage_csv(usage: pd.DataFrame | None) -> str:
    """A column a branch: a table of 224 layers and 26 tasks stays small."""
    if usage is None:
        return ""
    keys = ["run", "layer", "task"]
    table = usage.pivot_table(index=keys, columns="branch", values="weight", sort=False)
    return frame_csv(table.rename(columns=lambda b: f"branch_{b}").reset_index())


@dataclass(frozen=True, slots=True)
class SelectorView:
    """What picks the branch of a prompt: whom it sends where, and how sure it is."""

    confusion: list[tuple[str, HeatTable, str]]
    confusion_csv: str
    distances: list[tuple[str, Histograms, str]]
    distances_csv: str


def selector_view(found: Inspection) -> SelectorView | None:
    """The section, or None where no run has a selector."""
    confusion, distances = found.frame("confusion"), found.frame("distances")
    if confusion is None and distances is None:
        return None
    return SelectorView(
        [] if confusion is None else [_confusion(confusion, r) for r in _runs(found, confusion)],
        "" if confusion is None else frame_csv(confusion),
        [] if distances is None else [_distances(distances, r) for r in _runs(found, distances)],
        "" if distances is None else frame_csv(distances),
    )


def _runs(found: Inspection, frame: pd.DataFrame) -> list[str]:
    return [run for run in found.runs if run in set(frame["run"])]


def _confusion(confusion: pd.DataFrame, run: str) -> tuple[str, HeatTable, str]:
    """Shares of a task's rows, so that large tasks do not hide small ones."""
    rows = confusion[confusion["run"] == run]
    counts = wide(rows, "task", "branch", "rows").fillna(0)
    counts = counts.rename(columns=lambda b: "shared alone" if str(b) == "-1" else str(b))
    total = counts.sum(axis=1)
    shares = 100 * counts.div(total.where(total > 0, 1), axis=0)
    note = "percent of the task's held-out rows sent to each branch"
    table = heat_table(f"{run}: task by branch", note, shares, largest=100, digits=0)
    return run, table, f"{int(total.sum()):,} rows"


def _distances(distances: pd.DataFrame, run: str) -> tuple[str, Histograms, str]:
    rows = distances[distances["run"] == run]
    lines = [
        (str(task), "accent", [float(v) for v in group["distance"]])
        for task, group in rows.groupby("task", sort=False)
    ]
    title = f"{run}: distance of a prompt from its branch's centre"
    refused = int((~rows["accepted"].astype(bool)).sum())
    limits = [float(v) for v in rows["threshold"].tolist() if isfinite(float(v))]
    limit = f"; the limits lie between {min(limits):.3g} and {max(limits):.3g}" if limits else ""
    said = f"{refused:,} of {len(rows):,} prompts were too far from every branch{limit}."
    return run, histograms(title, "one row a task; the line is its median", lines), said
