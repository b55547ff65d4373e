"""What a comparison comes to, in plain sentences, with what speaks against trusting it."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.comparison.grid import BESIDE, FIRST
from manylora.comparison.result import Difference, MethodInfo, MethodScore

OFF_BUDGET = 0.05  # a share of the budget further from 1 than this is said


def verdict(
    reference: str,
    methods: Sequence[MethodInfo],
    scores: Sequence[MethodScore],
    differences: Sequence[Difference],
) -> str:
    """The sentences, one a line, the answer first.

    differences: of both metrics. Raises ValueError where they are not against `reference`.
    """
    other = {d.reference for d in differences} - {reference}
    if other:
        raise ValueError(f"differences are against {', '.join(sorted(other))}, not {reference}")
    nll = [d for d in differences if d.metric == "nll"]
    share = [d for d in differences if d.metric == "correct"]
    said = _answer(reference, nll, any(d.separates for d in share)) + _share(share)
    said += _seeds(scores) + _budget(methods) + _rates(methods)
    return "\n".join(said)


def nats(value: float) -> str:
    """A difference in nats a token, without its sign."""
    return f"{abs(value):.3f}"


def points(value: float) -> str:
    """A difference of shares in points of 100, without its sign."""
    return f"{100 * abs(value):.1f}"


def joined(names: Sequence[str]) -> str:
    """The names as a sentence says them."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def better(difference: Difference) -> bool:
    """Whether the method's mean is on the good side of the reference's."""
    mean = difference.value[0]
    return mean < 0 if difference.metric == "nll" else mean > 0


def _answer(reference: str, found: Sequence[Difference], by_share: bool) -> list[str]:
    if not found:
        return [f"There is no method to compare with {reference}."]
    apart = sorted((d for d in found if d.separates), key=lambda d: d.value[0])
    rest = [d for d in found if not d.separates]
    said = [_separates(d) for d in apart]
    if not apart:
        by = ", by nll" if by_share else ""
        said = [f"No method separates from {reference} on these tasks{by}."]
    elif rest:
        verb = "does" if len(rest) == 1 else "do"
        said.append(f"{joined([d.method for d in rest])} {verb} not separate from {reference}.")
    if rest:
        reach = max(abs(bound) for d in rest for bound in d.value[1:])
        said.append(
            f"That is not proof of equality: differences of up to {nats(reach)} nats a token stay "
            "possible."
        )
    return said


def _separates(difference: Difference) -> str:
    """ "hydralora is better than lora: 0.021 nats a token lower (95 %: ...), on 3 of 4 tasks." """
    good = better(difference)
    mean, low, high = difference.value
    near, far = sorted((abs(low), abs(high)))
    along = [t for t in difference.tasks if (t.value[0] < 0) == (mean < 0)]
    against = [
        t.task
        for t in difference.tasks
        if (t.value[1] > 0 if mean < 0 else t.value[2] < 0)  # its own interval is beyond 0
    ]
    but = f", but {'worse' if good else 'better'} on {joined(against)}" if against else ""
    return (
        f"{difference.method} is {'better' if good else 'worse'} than {difference.reference}: "
        f"{nats(mean)} nats a token {'lower' if good else 'higher'} "
        f"(95 %: {nats(near)} to {nats(far)}), on {len(along)} of {len(difference.tasks)} "
        f"{'task' if len(difference.tasks) == 1 else 'tasks'}{but}."
    )


def _share(found: Sequence[Difference]) -> list[str]:
    apart = sorted((d for d in found if d.separates), key=lambda d: -d.value[0])
    if not apart:
        return ["By the share of right answers none separates."] if found else []
    parts = [
        f"{d.method} is {'better' if better(d) else 'worse'} by {points(d.value[0])} points "
        f"(95 %: {points(min(d.value[1:], key=abs))} to {points(max(d.value[1:], key=abs))})"
        for d in apart
    ]
    rest = "" if len(apart) == len(found) else "; no other separates"
    return [f"By the share of right answers, {joined(parts)}{rest}."]


def _seeds(scores: Sequence[MethodScore]) -> list[str]:
    seeds = min((score.seeds for score in scores), default=1)
    if seeds == 1:
        return [
            "Seeds were not repeated: the intervals are over examples alone, and say nothing of "
            "what another seed would give. A separation on one seed may be luck."
        ]
    if seeds == 2:
        return ["With two seeds the intervals are very wide; three or more narrow them."]
    return []


def _budget(methods: Sequence[MethodInfo]) -> list[str]:
    off = [m for m in methods if abs(m.budget_share - 1) > OFF_BUDGET]
    if not off:
        return []
    parts = [f"{m.name} has {share_of_budget(m.budget_share)} of the budget" for m in off]
    return [f"Not at equal parameters: {joined(parts)}."]


def share_of_budget(share: float) -> str:
    """A share of the budget in percent, with decimals where it is small."""
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 10 else f"{percent:,.0f} %"


def _rates(methods: Sequence[MethodInfo]) -> list[str]:
    at_edge = [m for m in methods if m.at_edge and m.best_lr is not None and m.rates]
    if not at_edge:
        return []
    parts = []
    for m in at_edge:
        end = "highest" if m.best_lr == max(p.lr for p in m.rates) else "lowest"
        parts.append(f"{m.name} ({m.best_lr:.3g}, the {end})")
    fewest = min(len(m.rates) for m in at_edge)
    more = " With --wider-rates two more are tried there." if fewest <= len(FIRST + BESIDE) else ""
    return [
        f"The best rate lies at the edge of those tried, and a better one may lie beyond, for "
        f"{joined(parts)}.{more}"
    ]
