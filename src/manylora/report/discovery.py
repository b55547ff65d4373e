"""The page of a discovery: the answer, the curve that it rests on, the clusters and their tasks.

Made as the report of a run is: self-contained, without scripts, all text from the data escaped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manylora.discovery.result import Agreement, Candidate, Central, Discovery
from manylora.discovery.show import by_cluster, headline, percent, spent, variance, voices, words
from manylora.report.plots import Axis, LinePlot, Mark, csv_link, line_plot
from manylora.report.render import render

LONGEST_EXAMPLE = 600


def write_discovery_page(found: Discovery, path: Path) -> Path:
    """Write the page to `path` and return it."""
    plots = [curve_plot(found, measure) for measure in MEASURES]
    page = render(
        "discovery.html.j2",
        found=found,
        title=headline(found),
        facts=facts(found),
        plots=[plot for plot in plots if plot is not None],
        on_curve=on_curve(found),
        curve_csv=curve_csv(found.curve),
        voices=voices(found),
        clusters=cluster_views(found),
        clusters_csv=csv_link(
            ["cluster", "documents", "terms"],
            [[c.name, c.size, " ".join(c.terms)] for c in found.clusters],
        ),
        tasks=task_table(found.agreement, found.names) if found.agreement else None,
        variance=variance(found),
        settings=[(name.replace("_", " "), words(v)) for name, v in found.settings.items()],
        seconds=[(step, spent(seconds)) for step, seconds in found.seconds.items()],
        total=spent(sum(found.seconds.values())),
    )
    path.write_text(page, encoding="utf-8")
    return path


def facts(found: Discovery) -> list[tuple[str, str]]:
    """The discovery in a few numbers: (what, value)."""
    far, same = found.heterogeneity, found.agreement
    said = [
        ("clusters", f"{found.k} ({found.chosen_by})"),
        ("documents", f"{found.documents:,}"),
        ("in no cluster", f"{found.apart:,}"),
        ("variance between clusters", f"{100 * far.share:.1f} %"),
        ("the same, shuffled", f"{100 * far.control:.1f} %"),
    ]
    if same is not None:
        said += [
            ("named tasks", f"{len(same.rows):,}"),
            ("adjusted Rand index", f"{same.ari:.3f}"),
            ("normalised mutual information", f"{same.nmi:.3f}"),
        ]
    return said


@dataclass(frozen=True, slots=True)
class Measure:
    """What is plotted over K, and the criterion that reads its answer from that curve."""

    of: Callable[[Candidate], float | None]
    criterion: str
    title: str
    direction: str


MEASURES = [
    Measure(lambda c: c.sse, "elbow", "SSE", "lower with every cluster"),
    Measure(lambda c: c.silhouette, "silhouette", "Silhouette", "higher is better"),
    Measure(lambda c: c.davies_bouldin, "davies_bouldin", "Davies-Bouldin", "lower is better"),
]


@dataclass(frozen=True, slots=True)
class CurveView:
    """One measure over K, with the chosen K and that of its criterion marked."""

    plot: LinePlot
    note: str


def curve_plot(found: Discovery, measure: Measure) -> CurveView | None:
    """The plot of a measure, or None where no K has it."""
    values = {c.k: measure.of(c) for c in found.curve}
    points = [(float(k), value) for k, value in values.items() if value is not None]
    if not points:
        return None
    own = next((c.k for c in found.criteria if c.name == measure.criterion), None)
    y = Axis.over(value for _, value in points)
    lines = [("line", points)]
    if on_curve(found):
        lines.append(("choice", [(float(found.k), y.low), (float(found.k), y.high)]))
    marks = [Mark("at", (k, v), 2, f"K = {k:.0f}: {v:.4g}") for k, v in points]
    marks += [
        Mark("after", (k, v), 5, f"chosen: K = {k:.0f}, {v:.4g}") for k, v in points if k == found.k
    ]
    marks += [
        Mark("own", (k, v), 9, f"{measure.criterion}: K = {k:.0f}, {v:.4g}")
        for k, v in points
        if k == own
    ]
    note = measure.direction if own is None else f"{measure.direction}; K = {own}"
    plot = line_plot(
        measure.title,
        lines,
        y,
        max(values),
        height=200,
        x_bins=10,
        first_step=min(values),
        marks=marks,
    )
    return CurveView(plot, note)


def on_curve(found: Discovery) -> bool:
    """Whether the chosen K is one of those that the curve has; a given one may not be."""
    return any(c.k == found.k for c in found.curve)


def curve_csv(curve: list[Candidate]) -> str:
    """The curve as a data: address."""
    rows = [[c.k, c.sse, c.silhouette, c.davies_bouldin] for c in curve]
    return csv_link(["k", "sse", "silhouette", "davies_bouldin"], rows)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster as its card shows it; width: percent of all documents."""

    name: str
    size: int
    share: str
    width: float
    terms: list[str]
    central: list[Central]


def cluster_views(found: Discovery) -> list[ClusterView]:
    """The clusters as their cards show them, long documents clipped."""
    return [
        ClusterView(
            c.name,
            c.size,
            percent(c.size, found.documents),
            round(100 * c.size / found.documents, 2),
            c.terms,
            [_clipped(document) for document in c.central],
        )
        for c in found.clusters
    ]


def _clipped(document: Central) -> Central:
    text = document.text
    short = text if len(text) <= LONGEST_EXAMPLE else text[:LONGEST_EXAMPLE] + " …"
    return document.model_copy(update={"text": short})


@dataclass(frozen=True, slots=True)
class Cell:
    """A task's documents in one cluster; weight: percent of the task."""

    text: str
    weight: int
    label: str


@dataclass(frozen=True, slots=True)
class TaskTable:
    """Tasks by cluster; `columns` are the clusters' names, and "none" where documents are apart."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, int, list[Cell | None]]]
    csv: str


def task_table(agreement: Agreement, names: list[str]) -> TaskTable:
    """Tasks in the order of the cluster that they are in, so that agreement is a diagonal."""
    rows = by_cluster(agreement)
    columns = [(str(number), name) for number, name in enumerate(names, start=1)]
    if any(counts[-1] for _, counts in rows):
        columns.append(("none", "in no cluster"))

    def cell(task: str, name: str, count: int, total: int) -> Cell | None:
        if not count:
            return None
        text = percent(count, total).removesuffix(" %")
        return Cell(text, round(100 * count / total), f"{task}, {name}: {count:,} of {total:,}")

    return TaskTable(
        columns,
        [
            (
                task,
                sum(counts),
                [
                    cell(task, name, count, sum(counts))
                    for (_, name), count in zip(columns, counts[: len(columns)], strict=True)
                ],
            )
            for task, counts in rows
        ],
        csv_link(["task", *names, "none"], [[task, *counts] for task, counts in rows]),
    )
