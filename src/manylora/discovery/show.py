"""What discovery found, in words: for the terminal, and what the page says in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.discovery.result import Agreement, Criterion, Discovery

CLUSTERS_OF_A_TASK = 5
TERMS_OF_A_CLUSTER = 8


def print_discovery(found: Discovery, out: Console) -> None:
    """Write the answer, who says what, the clusters, and the tasks in them to the terminal."""
    several = "yes" if found.heterogeneity.several else "no"
    answer = f"{headline(found)} ({found.chosen_by}); worth several branches: {several}"
    out.print(Text.assemble((_plain(answer), "bold"), _plain(f". {found.heterogeneity.advice}")))
    if found.disagreement:
        out.print(Text(_plain(found.disagreement), "yellow"))
    _print_criteria(found, out)
    _print_clusters(found, out)
    if found.agreement is not None:
        _print_tasks(found.agreement, out)
    if found.k > 1:
        out.print(Text(variance(found)))
    out.print(Text(_plain(f"How it was found: {words(found.settings)}"), "dim"))
    steps = ", ".join(f"{step} {spent(seconds)}" for step, seconds in found.seconds.items())
    out.print(Text(_plain(f"It took {spent(sum(found.seconds.values()))}: {steps}"), "dim"))


def headline(found: Discovery) -> str:
    """How many clusters in how many documents."""
    clusters = "1 cluster" if found.k == 1 else f"{found.k:,} clusters"
    documents = "1 document" if found.documents == 1 else f"{found.documents:,} documents"
    apart = f", {found.apart:,} of them in none" if found.apart else ""
    return f"{clusters} in {documents}{apart}"


def voices(found: Discovery) -> list[Criterion]:
    """The criteria; and, first, whoever chose, where that is none of them."""
    if any(criterion.name == found.chosen_by for criterion in found.criteria):
        return found.criteria
    return [Criterion(name=found.chosen_by, k=found.k), *found.criteria]


def by_cluster(agreement: Agreement) -> list[tuple[str, list[int]]]:
    """The tasks in the order of the cluster that most of their documents are in."""

    def place(row: tuple[str, list[int]]) -> tuple[int, float]:
        most = max(row[1])
        return row[1].index(most), -most / max(sum(row[1]), 1)

    return sorted(agreement.rows.items(), key=place)


def variance(found: Discovery) -> str:
    """How far apart the clusters are, against the control."""
    far = found.heterogeneity
    return (
        f"Between the clusters lies {100 * far.share:.1f} % of the documents' variance; with the "
        f"terms shuffled over the documents, {100 * far.control:.1f} %."
    )


def percent(part: float, whole: float) -> str:
    """A share without decimals; neither 0 nor 100 unless it is that exactly."""
    share = 100 * part / max(whole, 1)
    if 0 < share < 0.5:
        return "<1 %"
    return ">99 %" if 99.5 <= share < 100 else f"{share:.0f} %"


def spent(seconds: float) -> str:
    """Seconds of a step, with a decimal where they are few."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def words(value: Any) -> str:
    """A setting as a reader says it; those of a group behind one another."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return "; ".join(f"{name.replace('_', ' ')}: {words(v)}" for name, v in value.items())
        case list() | tuple():
            return ", ".join(map(words, value))
        case _:
            return str(value)


def _plain(text: str) -> str:
    """The text without what a terminal obeys: rows may hold escape codes."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _table(*headings: str, right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        if heading in right:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    return table


def _print_criteria(found: Discovery, out: Console) -> None:
    table = _table("criterion", "clusters", "", right=["clusters"])
    for voice in voices(found):
        chosen = voice.name == found.chosen_by
        said = "no answer" if voice.k is None else str(voice.k)
        note = "; ".join(part for part in ("chosen" if chosen else "", voice.note) if part)
        style = "bold" if chosen else ""
        table.add_row(*(Text(_plain(part), style) for part in (voice.name, said, note)))
    out.print(table)


def _print_clusters(found: Discovery, out: Console) -> None:
    table = _table("cluster", "documents", "share", "terms", right=["documents", "share"])
    rows = [(c.name, c.size, ", ".join(c.terms[:TERMS_OF_A_CLUSTER])) for c in found.clusters]
    if found.apart:
        rows.append(("in none", found.apart, ""))
    for name, size, terms in rows:
        cells = (name, f"{size:,}", percent(size, found.documents), terms)
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    out.print(table)


def _print_tasks(agreement: Agreement, out: Console) -> None:
    table = _table("task", "documents", "in cluster", right=["documents"])
    for task, counts in by_cluster(agreement):
        cells = (task, f"{sum(counts):,}", _where(counts))
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    out.print(table)
    out.print(
        f"Clusters against tasks: adjusted Rand index {agreement.ari:.2f}, normalised mutual "
        f"information {agreement.nmi:.2f} (1: they say the same).",
        highlight=False,
    )


def _where(counts: Sequence[int]) -> str:
    """The clusters that a task is in, by number, the fullest first."""
    *inside, none = counts
    numbered = [(size, number) for number, size in enumerate(inside, start=1) if size]
    numbered.sort(key=lambda pair: (-pair[0], pair[1]))
    shown, rest = numbered[:CLUSTERS_OF_A_TASK], numbered[CLUSTERS_OF_A_TASK:]
    parts = [f"{number}: {percent(size, sum(counts))}" for size, number in shown]
    if rest:
        parts.append(f"{len(rest)} more: {percent(sum(size for size, _ in rest), sum(counts))}")
    if none:
        parts.append(f"none: {percent(none, sum(counts))}")
    return ", ".join(parts)
