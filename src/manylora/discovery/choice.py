"""From the curve to a number of clusters: every criterion, and which of them decides.

    gap             the last K whose gain is twice the next one's, in Ward's tree
    log_elbow       where the logarithm of the SSE turns (kneed); only of clusters that stand apart
    elbow           where the SSE curve turns (kneed; HydraLoRA, section 3.2.1)
    silhouette      its highest point
    davies_bouldin  its lowest point

gain(K) is the SSE saved by going from K - 1 to K clusters. A corpus with clear parts has one K
after which gains collapse: `gap` finds it and decides. Where gains only fade there is no such K,
and an elbow decides: of the logarithm where clusters are tight, for the SSE has then all but gone
long before the last of them is found; else of the SSE itself. An elbow depends on how far the curve
is drawn. docs/discovery.md says how often each is right; the other criteria are shown beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kneed import KneeLocator

from manylora.discovery.curve import Curve
from manylora.discovery.result import Candidate, Criterion

CLEAR = 2.0
TIGHT = 0.5


def criteria(curve: Curve) -> list[Criterion]:
    """What each criterion says of the curve, the deciding ones first."""
    drawn = curve.candidates
    return [_gap(curve), _log_elbow(drawn), _elbow(drawn), *_indices(drawn)]


def choose(found: Sequence[Criterion]) -> Criterion:
    """The first criterion that has an answer."""
    return next(criterion for criterion in found if criterion.k is not None)


def disagreement(k: int, found: Sequence[Criterion]) -> str:
    """A sentence naming who says otherwise; empty when all that answer say k."""
    others = [f"{criterion.name} says {criterion.k}" for criterion in found if criterion.k]
    others = [said for said in others if not said.endswith(f" {k}")]
    return f"The criteria disagree: {k} is taken, but {', '.join(others)}." if others else ""


def _gap(curve: Curve) -> Criterion:
    gains = {} if curve.tree is None else curve.tree.gains(len(curve.candidates) + 1)
    ratios = {k: gains[k] / max(gains[k + 1], 1e-12) for k in gains if k + 1 in gains}
    clear = [k for k, ratio in ratios.items() if ratio >= CLEAR]
    if not clear:
        sharpest = max(ratios, key=lambda k: ratios[k], default=None)
        shown = (
            "" if sharpest is None else f"; the sharpest is {ratios[sharpest]:.1f} at {sharpest}"
        )
        return Criterion(name="gap", k=None, note=f"no drop by a factor of {CLEAR:g}{shown}")
    return Criterion(name="gap", k=max(clear), note=f"gain drops {ratios[max(clear)]:.1f}-fold")


def _log_elbow(curve: Sequence[Candidate]) -> Criterion:
    tight = max((c.silhouette for c in curve if c.silhouette is not None), default=0.0)
    if tight < TIGHT:
        note = f"not asked: the silhouette stays below {TIGHT:g}"
        return Criterion(name="log_elbow", k=None, note=note)
    least = 1e-9 * curve[0].sse
    found = _knee(curve, [math.log(max(c.sse, least)) for c in curve])
    return Criterion(name="log_elbow", k=found, note=f"of the log SSE up to {curve[-1].k}")


def _elbow(curve: Sequence[Candidate]) -> Criterion:
    if len(curve) < 3:
        return Criterion(name="elbow", k=len(curve), note="no curve of three points")
    found = _knee(curve, [c.sse for c in curve])
    turn = "of the SSE curve" if found else "the SSE curve does not turn"
    return Criterion(name="elbow", k=found, note=f"{turn} up to {curve[-1].k}")


def _knee(curve: Sequence[Candidate], values: Sequence[float]) -> int | None:
    ks = [c.k for c in curve]
    knee = KneeLocator(ks, list(values), curve="convex", direction="decreasing").knee
    return None if knee is None or knee == ks[0] else int(knee)  # an end is no turn


def _indices(curve: Sequence[Candidate]) -> list[Criterion]:
    high = [(c.silhouette, c.k) for c in curve if c.silhouette is not None]
    low = [(c.davies_bouldin, c.k) for c in curve if c.davies_bouldin is not None]
    best = max(high, key=lambda pair: pair[0], default=None)
    least = min(low, key=lambda pair: pair[0], default=None)
    return [
        Criterion(name="silhouette", k=None, note="needs two clusters")
        if best is None
        else Criterion(name="silhouette", k=best[1], note=f"highest: {best[0]:.2f}"),
        Criterion(name="davies_bouldin", k=None, note="needs two clusters")
        if least is None
        else Criterion(name="davies_bouldin", k=least[1], note=f"lowest: {least[0]:.2f}"),
    ]
