"""An inspection as matplotlib figures, for papers and notebooks: one a measure.

They show the tables that the page shows. No window is opened and no global state of matplotlib is
touched: a figure is saved with `savefig`, or shown by a notebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manylora.inspect.conflicts import matrix
from manylora.inspect.frames import Inspection
from manylora.inspect.interference import ALL

# Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b5bb5", "#5d666f")
MOST_PANELS = 12


def figures(found: Inspection) -> dict[str, Figure]:
    """A figure for each measure that is there: measure -> figure."""
    makers: dict[str, Callable[[pd.DataFrame], Figure]] = {
        "singular_values": singular_values_figure,
        "spectra": spectra_figure,
        "subspaces": subspaces_figure,
        "projection": projection_figure,
        "usage": usage_figure,
        "information": information_figure,
        "confusion": confusion_figure,
        "interference": interference_figure,
        "transfer": transfer_figure,
        "training": training_figure,
    }
    frames = {name: found.frame(name) for name in makers}
    return {name: makers[name](frame) for name, frame in frames.items() if frame is not None}


def singular_values_figure(values: pd.DataFrame) -> Figure:
    """Each part's singular values over the largest of their layer: median, and middle half."""
    shown = _no_tasks(values)
    largest = shown.groupby(["run", "layer", "part"])["value"].transform("max")
    rows = shown.assign(share=shown["value"] / largest.where(largest > 0))
    figure, (axes,) = _panels(1, width=6)
    for place, ((run, part), group) in enumerate(rows.groupby(["run", "part"], sort=False)):
        quantiles = group.groupby("index")["share"].quantile([0.25, 0.5, 0.75]).unstack()
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(quantiles.index, quantiles[0.5], color=colour, label=f"{run}: {part}")
        axes.fill_between(
            quantiles.index, quantiles[0.25], quantiles[0.75], color=colour, alpha=0.15
        )
    axes.set(yscale="log", xlabel="index", ylabel="singular value / largest")
    axes.legend(fontsize=7, frameon=False)
    return figure


def spectra_figure(spectra: pd.DataFrame) -> Figure:
    """Histograms over layers of each measure, one line a run and part."""
    names = {
        "top1": "share of the largest value",
        "entropy": "entropy, nats",
        "effective_rank": "effective rank",
        "gini": "Gini",
    }
    shown = _no_tasks(spectra)
    figure, panels = _panels(len(names))
    for axes, (column, title) in zip(panels, names.items(), strict=True):
        bins = np.histogram_bin_edges(shown[column].to_numpy(), bins=24).tolist()
        for place, ((run, part), group) in enumerate(shown.groupby(["run", "part"], sort=False)):
            colour = COLOURS[place % len(COLOURS)]
            axes.hist(group[column], bins, histtype="step", color=colour, label=f"{run}: {part}")
        axes.set(xlabel=title, ylabel="layers")
    panels[0].legend(fontsize=6, frameon=False)
    return figure


def subspaces_figure(phi: pd.DataFrame) -> Figure:
    """phi(i, j) of each pair and side, mean over layers, 0 to 1."""
    means = phi.groupby(["side", "left", "right", "i", "j"], sort=False)["phi"].mean().reset_index()
    pairs = list(means.groupby(["side", "left", "right"], sort=False))[:MOST_PANELS]
    figure, panels = _panels(len(pairs))
    for axes, ((side, left, right), pair) in zip(panels, pairs, strict=True):
        table = pair.pivot(index="i", columns="j", values="phi")
        _heat(axes, table, 0.0, 1.0, "cividis")
        axes.set_title(f"{left} | {right}, {side}", fontsize=7)
    return figure


def projection_figure(points: pd.DataFrame) -> Figure:
    """Each matrix by depth, and by run where there are several."""
    ways = ["depth", "module", *(["run"] if points["run"].nunique() > 1 else [])]
    panels = [(matrix, way) for matrix in points["matrix"].unique() for way in ways]
    figure, axes = _panels(len(panels))
    for ax, (matrix_, way) in zip(axes, panels, strict=True):
        rows = points[points["matrix"] == matrix_]
        if way == "depth":
            ax.scatter(rows["x"], rows["y"], c=rows["depth"], cmap="viridis", s=9)
        else:
            for place, (name, group) in enumerate(rows.groupby(way, sort=False)):
                colour = COLOURS[place % len(COLOURS)]
                ax.scatter(group["x"], group["y"], color=colour, s=9, label=str(name))
            ax.legend(fontsize=6, frameon=False)
        ax.set(title=f"{matrix_} by {way}", xticks=[], yticks=[])
    return figure


def usage_figure(usage: pd.DataFrame) -> Figure:
    """Task by branch, mean over layers, one panel a run; from 0 to the largest weight."""
    table = usage.groupby(["run", "task", "branch"], sort=False)["weight"].mean().reset_index()
    most = float(table["weight"].max())
    runs = list(table.groupby("run", sort=False))
    figure, panels = _panels(len(runs))
    for axes, (run, rows) in zip(panels, runs, strict=True):
        _heat(axes, _in_order(rows, "task", "branch", "weight"), 0, most, "cividis")
        axes.set(title=str(run), xlabel="branch")
    return figure


def information_figure(information: pd.DataFrame) -> Figure:
    """What the branch says of the task, in nats, by block: one line a kind of layer."""
    runs = list(information.groupby("run", sort=False))
    figure, panels = _panels(len(runs), width=5)
    for axes, (run, rows) in zip(panels, runs, strict=True):
        for place, (module, group) in enumerate(rows.groupby("module", sort=False)):
            means = group.groupby("depth")["nats"].mean()
            axes.plot(means.index, means, color=COLOURS[place % len(COLOURS)], label=str(module))
        axes.set(title=str(run), xlabel="block", ylabel="branch and task, nats")
        axes.legend(fontsize=6, frameon=False)
    return figure


def confusion_figure(confusion: pd.DataFrame) -> Figure:
    """Shares of a task's rows that the selector sends to each branch."""
    runs = list(confusion.groupby("run", sort=False))
    figure, panels = _panels(len(runs))
    for axes, (run, rows) in zip(panels, runs, strict=True):
        counts = _in_order(rows, "task", "branch", "rows").fillna(0)
        _heat(axes, counts.div(counts.sum(axis=1).clip(lower=1), axis=0), 0, 1, "cividis")
        axes.set(title=str(run), xlabel="branch")
    return figure


def interference_figure(cosines: pd.DataFrame) -> Figure:
    """Cosine of the tasks' gradients over all trained parameters, one panel a run."""
    runs = list(cosines[cosines["part"] == ALL].groupby("run", sort=False))
    tables = {str(run): matrix(rows) for run, rows in runs}
    masked = {run: table.mask(np.eye(len(table), dtype=bool)) for run, table in tables.items()}
    most = max(float(np.nanmax(np.abs(table.to_numpy()))) for table in masked.values())
    figure, panels = _panels(len(masked))
    for axes, (run, table) in zip(panels, masked.items(), strict=True):
        _heat(axes, table, -most, most, "PuOr")
        axes.set_title(run)
    return figure


def transfer_figure(transfer: pd.DataFrame) -> Figure:
    """Change of nll of each task (across) without another (down); above 0: it helped."""
    runs = list(transfer.groupby("run", sort=False))
    most = float(transfer["nll"].abs().max())
    figure, panels = _panels(len(runs))
    for axes, (run, rows) in zip(panels, runs, strict=True):
        _heat(axes, _in_order(rows, "left_out", "task", "nll"), -most, most, "PuOr")
        axes.set(title=str(run), ylabel="left out")
    return figure


def training_figure(training: pd.DataFrame) -> Figure:
    """Each logged quantity over the steps, one line a run and part."""
    kinds = list(training.groupby("what", sort=False))
    figure, panels = _panels(len(kinds))
    for axes, (what, rows) in zip(panels, kinds, strict=True):
        for place, ((run, of), group) in enumerate(rows.groupby(["run", "of"], sort=False)):
            label = f"{run} {of}".strip()
            axes.plot(group["step"], group["value"], color=COLOURS[place % 8], lw=1, label=label)
        axes.set(title=str(what).replace("_", " "), xlabel="step")
        axes.legend(fontsize=6, frameon=False)
    return figure


def _no_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the parts that are one a task or cluster, where there are others."""
    others = frame[~frame["part"].str.match("(task|cluster) ")]
    return frame if others.empty else others


def _in_order(rows: pd.DataFrame, index: str, columns: str, value: str) -> pd.DataFrame:
    """A table whose names come as they come in the rows."""
    table = rows.pivot(index=index, columns=columns, values=value)
    return table.reindex(index=rows[index].unique(), columns=rows[columns].unique())


def _panels(count: int, width: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many plots, four a row."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _heat(axes: Axes, table: pd.DataFrame, low: float, high: float, colours: str) -> None:
    image = axes.imshow(table.to_numpy(dtype=float), vmin=low, vmax=high, cmap=colours)
    axes.set_xticks(range(table.shape[1]), [str(c) for c in table.columns], fontsize=6, rotation=90)
    axes.set_yticks(range(table.shape[0]), [str(r) for r in table.index], fontsize=6)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
