"""A comparison in words and as Markdown; the page says numbers in the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from manylora.comparison.result import Comparison, Interval, MethodInfo, MethodScore
from manylora.comparison.verdict import share_of_budget
from manylora.discovery.show import words
from manylora.report.page import duration

_TUNED = (
    "Each method was trained at several learning rates and scored on rows kept apart for "
    "validation; the rate with the lowest nll was taken, then trained with every seed and scored "
    "on held-out rows."
)
_GIVEN = (
    "Every method was trained at the one learning rate that was given, which favours whichever "
    "method it suits, with every seed, and scored on held-out rows."
)
_MEANT = (
    "nll is nats per answer token within a task; correct is the share of rows whose every answer "
    "token is the likeliest; tasks count the same. Intervals are 95 %: resampled examples plus "
    "Student's t over seeds. A method separates when its difference does so at 5 % for all "
    "methods of that metric together (Holm), which is stricter than its plain interval."
)


def how(found: Comparison) -> str:
    """How it was done, in words."""
    tuned = any(info.rates for info in found.methods)
    return f"{_TUNED if tuned else _GIVEN} {_MEANT}"


def markdown(found: Comparison) -> str:
    """The verdict, the methods, their scores by task, and how it was done."""
    return "\n\n".join(
        [
            f"# {headline(found)}",
            "\n".join(f"- {_plain(line)}" for line in found.verdict.splitlines()),
            "## Methods",
            table(METHOD_HEADER, [method_row(found, info) for info in found.methods]),
            f"## Against {_plain(found.reference)}",
            table(DIFFERENCE_HEADER, difference_rows(found)),
            "## nll by task (nats a token; lower is better)",
            _by_task(found, "nll"),
            "## Correct by task (percent; higher is better)",
            _by_task(found, "correct"),
            "## How it was done",
            how(found),
            table(["setting", "value"], setting_rows(found)),
            _code(found.command),
        ]
    )


def headline(found: Comparison) -> str:
    """How many methods on how many tasks, at which budget."""
    tasks = len(found.scores[0].tasks) if found.scores else 0
    seeds = f"{found.seeds} seed{'s' if found.seeds != 1 else ''}"
    return (
        f"{len(found.methods)} method{'s' if len(found.methods) != 1 else ''} on "
        f"{tasks} task{'s' if tasks != 1 else ''}, {seeds} each, at the budget of {found.budget}"
    )


METHOD_HEADER = [
    *("method", "parameters", "of budget", "best rate", "nll", "correct %"),
    *("a run", "kWh a run", "peak memory"),
]
DIFFERENCE_HEADER = ["method", "nll", "separates", "correct, points", "separates"]


def method_row(found: Comparison, info: MethodInfo) -> list[str]:
    """A method as the tables show it."""
    score = score_of(found, info.name)
    return [
        info.name,
        f"{info.params:,}",
        share_of_budget(info.budget_share),
        rate(info),
        interval(score.nll) if score else "–",
        interval(score.correct, 100, 1) if score else "–",
        spent(info.seconds),
        energy(info),
        memory(info.peak_memory_bytes),
    ]


def difference_rows(found: Comparison) -> list[list[str]]:
    """Every method less the reference, by both metrics."""
    by_name = {(d.method, d.metric): d for d in found.differences}
    rows = []
    for method in dict.fromkeys(d.method for d in found.differences):
        row = [method]
        for metric, scale, digits in (("nll", 1, 3), ("correct", 100, 1)):
            d = by_name.get((method, metric))
            row.append(interval(d.value, scale, digits, sign=True) if d else "–")
            row.append(("yes" if d.separates else "no") if d else "–")
        rows.append(row)
    return rows


def setting_rows(found: Comparison) -> list[list[str]]:
    """Settings, budget and device: (what, value)."""
    said = [
        ["budget", f"{found.budget}: {found.budget_params:,} parameters"],
        ["reference", found.reference],
        ["seeds", f"{found.seeds:,}"],
        ["device", found.device],
    ]
    return said + [[name.replace("_", " "), words(v)] for name, v in found.settings.items()]


def score_of(found: Comparison, method: str) -> MethodScore | None:
    """The method's scores, or None before its first test run."""
    return next((score for score in found.scores if score.method == method), None)


def interval(value: Interval, scale: float = 1, digits: int = 3, sign: bool = False) -> str:
    """Mean and bounds: 1.234 (1.200 to 1.268)."""
    mark = "+" if sign else ""
    mean, low, high = (f"{scale * part:{mark}.{digits}f}" for part in value)
    return f"{mean} ({low} to {high})"


def rate(info: MethodInfo) -> str:
    """The best learning rate, and whether it lies at the edge of those tried."""
    if info.best_lr is None:
        return "–"
    return f"{info.best_lr:.3g}{' (edge)' if info.at_edge else ''}"


def spent(seconds: float | None) -> str:
    """Seconds of a run as a reader says them."""
    return "–" if seconds is None else duration(seconds)


def energy(info: MethodInfo) -> str:
    """Energy of a run in kWh, all parts together."""
    return "–" if info.energy_kwh is None else f"{sum(info.energy_kwh.values()):.3g}"


def memory(size: int | None) -> str:
    """Bytes as GiB."""
    return "–" if size is None else f"{size / 2**30:.2f} GiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing in a cell ends it."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _by_task(found: Comparison, metric: str) -> str:
    scale, digits = (1, 3) if metric == "nll" else (100, 1)
    tasks = [t.task for t in found.scores[0].tasks] if found.scores else []
    rows = [
        [task]
        + [interval(getattr(score.tasks[place], metric), scale, digits) for score in found.scores]
        for place, task in enumerate(tasks)
    ]
    overall = ["all tasks", *(interval(getattr(s, metric), scale, digits) for s in found.scores)]
    return table(["task", *(score.method for score in found.scores)], [*rows, overall])


def _plain(text: str) -> str:
    """One line that Markdown reads as text."""
    for sign in "\\`*<>[]|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _code(text: str) -> str:
    return "    " + " ".join(text.split())
