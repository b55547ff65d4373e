"""Time and activations against branches, rank and tokens, with the roofline, by matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from manylora.speed.grid import METHODS, ONE_BRANCH, Row
from manylora.speed.measure import OUT_OF_MEMORY
from manylora.speed.model import Shape
from manylora.speed.results import Raw
from manylora.speed.roofline import chip_of, roofline

R, N = 16, 3
SWEEPS = (("n", "branches N"), ("r", "rank r"), ("tokens", "tokens a step"))
MEASURES = (("step_ms", "median step, ms"), ("activation_gib", "activations, GiB"))
TITLES = {
    "frozen": "frozen model",
    "peft_lora": "PEFT LoRA",
    "autograd_lora": "LoRA, hand-written autograd",
    "loop_hydralora": "HydraLoRA, published loop",
    "lora": "manylora LoRA",
    "multilora": "manylora MultiLoRA",
    "hydralora": "manylora HydraLoRA",
    "lora_moe": "manylora LoRA-MoE",
    "cluster": "manylora branch per cluster",
}
COLOURS = {
    "frozen": "#555555",
    "peft_lora": "#d55e00",
    "autograd_lora": "#cc79a7",
    "loop_hydralora": "#e69f00",
    "lora": "#56b4e9",
    "multilora": "#009e73",
    "hydralora": "#0072b2",
    "lora_moe": "#8c6bb1",
    "cluster": "#a6761d",
}


def draw(rows: Sequence[Raw], folder: Path, shape: Shape) -> list[Path]:
    """One SVG for each mode that has something to show; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for mode in ("eager", "compiled"):
        mine = [row for row in rows if row["mode"] == mode and _plain(row)]
        if not mine:
            continue
        path = folder / f"speed_{mode}.svg"
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "manylora"}):
            FigureCanvasSVG(draw_mode(mine, shape, mode)).print_svg(path, metadata={"Date": None})
        written.append(path)
    return written


def draw_mode(rows: Sequence[Raw], shape: Shape, mode: str) -> Figure:
    """Two rows of panels, time and memory, over the three sweeps."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for column, (field, label) in enumerate(SWEEPS):
        points = sweep(rows, field)
        for line, (measure, title) in enumerate(MEASURES):
            axis: Axes = axes[line][column]
            _panel(axis, points, field, measure)
            _mark_failed(axis, points, field)
            if measure == "step_ms":
                _draw_roofline(axis, points, field, shape)
            axis.set_ylabel(title if column == 0 else "")
            axis.set_xlabel(label)
            axis.set_xticks(sorted({r[field] for r in points} - {0}))
            axis.grid(alpha=0.25)
        fixed = {"n": f"r = {R}", "r": f"N = {N}", "tokens": f"r = {R}, N = {N}"}[field]
        here = "" if field == "tokens" or not points else f", {points[0]['tokens']} tokens"
        axes[0][column].set_title(fixed + here, fontsize=10)
    for line in axes:
        line[0].set_ylim(bottom=0)
    found = {t: h for a in axes.flat for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{rows[0]['device']}, {mode}, adapters in bf16, all seven linear layers")
    return figure


def _plain(row: Raw) -> bool:
    return bool(
        row["targets"] == "all"
        and row["adapter_dtype"] == "bfloat16"
        and not row["dropout"]
        and not row["checkpointing"]
    )


def sweep(rows: Sequence[Raw], field: str) -> list[Raw]:
    """The rows of one sweep: what is not swept stands at r = 16 and N = 3.

    The tokens stand where HydraLoRA was measured at the most values of the field.
    """
    rows = [row for row in rows if _on_sweep(row, field)]
    if field == "tokens" or not rows:
        return rows
    hydra = [row for row in rows if row["method"] == "hydralora" and row["step_ms"]]
    counts = Counter(tokens for tokens, _ in {(row["tokens"], row[field]) for row in hydra})
    (most, _), *_ = counts.most_common(1) or [(rows[0]["tokens"], 0)]
    return [row for row in rows if row["tokens"] == most]


def _on_sweep(row: Raw, field: str) -> bool:
    r_fits = field == "r" or row["r"] in (0, R)
    n_fits = field == "n" or row["n"] in (0, N) or row["method"] in ONE_BRANCH
    return r_fits and n_fits


def _panel(axis: Axes, rows: Sequence[Raw], field: str, measure: str) -> None:
    """A line for each method, dashed and level where the swept field is not the method's."""
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method and r["step_ms"] and r[measure]]
        points = sorted((r[field], _measured(r, measure)) for r in mine)
        if not points:
            continue
        colour, label = COLOURS[method], TITLES[method]
        level = method == "frozen" or (method in ONE_BRANCH and field == "n")
        if level and field != "tokens":
            axis.axhline(points[0][1], color=colour, linestyle="--", linewidth=1.2, label=label)
        else:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.4, label=label)


def _mark_failed(axis: Axes, rows: Sequence[Raw], field: str) -> None:
    """A cross at the top edge for each row that did not fit the memory."""
    for row in rows:
        if row.get("error") == OUT_OF_MEMORY:
            axis.plot(
                [row[field]],
                [0.96],
                transform=axis.get_xaxis_transform(),
                color=COLOURS[row["method"]],
                marker="x",
                linestyle="none",
                label=f"{TITLES[row['method']]}: {OUT_OF_MEMORY}",
            )


def _measured(row: Raw, measure: str) -> float:
    return median(row[measure]) if measure == "step_ms" else float(row[measure])


def _draw_roofline(axis: Axes, rows: Sequence[Raw], field: str, shape: Shape) -> None:
    """The least time of the frozen model and of HydraLoRA, where the device's figures are known."""
    chip = chip_of(rows[0]["device"]) if rows else None
    if chip is None:
        return
    for method in ("frozen", "hydralora", "loop_hydralora"):
        like = "hydralora" if method == "frozen" else method
        over = sorted({r[field] for r in rows if r["method"] == like and r["step_ms"]})
        points = []
        for value in over:
            at = {"r": R, "n": N, "tokens": rows[0]["tokens"], field: value}
            row = Row(rows[0]["mode"], method, r=at["r"], n=at["n"], rows=1, length=at["tokens"])
            points.append(roofline(shape, row, chip).ms)
        if points:
            label = f"roofline: {TITLES[method]}"
            axis.plot(over, points, color=COLOURS[method], linestyle=":", linewidth=1, label=label)
