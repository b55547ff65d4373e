"""Intervals that respect both examples and seeds, and what separates from the reference.

A task's nll is the sum of its rows' nll over the sum of their tokens; correct is the share of rows.
Seeds are averaged, and each task counts the same. For a difference the rows of two methods with the
same seed and example are subtracted first. Tasks are those given: nothing is said of other tasks.

An estimate over S seeds and n examples, the same for every seed, has the variance

    s_seed^2/S + s_example^2/n + s_rest^2/(S n)

Resampling a handful of seeds gives too narrow an interval (the resampled variance is (S-1)/S of the
right one, and the tails are those of a normal). So the two levels are drawn apart and added:

    examples   resampled within each task, one draw for all methods and seeds, applied to the mean
               over seeds; scaled by sqrt(n/(n-1)), and down to s_example alone
    seeds      the standard error of the seeds' macro means, which holds s_seed and s_rest, times
               Student's t with S-1 degrees of freedom

Their sum is the Behrens-Fisher distribution of two parts of unknown variance (Fisher 1935), whose
intervals are known to err on the wide side; tests/test_comparison_intervals.py simulates them. With
one seed there is no second part, and the interval is over examples alone.

value is the plain 95 % interval of its difference. separates is stricter: 5 % for one or more false
separations among all methods of that metric, after Holm (1979).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from manylora.comparison.result import (
    Difference,
    Interval,
    MethodScore,
    TaskDifference,
    TaskScore,
)
from manylora.comparison.rows import Floats, Scores

RESAMPLES = 10_000
LEVEL = 0.05
METRICS = ("nll", "correct")
CHUNK = 4_000_000  # counts held at once while examples are drawn


def summarise(scores: Scores, resamples: int = RESAMPLES) -> list[MethodScore]:
    """Each method's scores, overall and by task."""
    nll = _estimates(*_values(scores, "nll"), resamples)
    share = _estimates(*_values(scores, "correct"), resamples)
    return [
        MethodScore(
            method=method,
            seeds=len(scores.seeds),
            nll=nll[-1].interval(m, low=0.0),
            correct=share[-1].interval(m, low=0.0, high=1.0),
            tasks=[
                TaskScore(
                    task=rows.task,
                    n=len(rows.examples),
                    nll=nll[t].interval(m, low=0.0),
                    correct=share[t].interval(m, low=0.0, high=1.0),
                )
                for t, rows in enumerate(scores.tasks)
            ],
        )
        for m, method in enumerate(scores.methods)
    ]


def differences(
    scores: Scores, reference: str, metric: str, resamples: int = RESAMPLES
) -> list[Difference]:
    """Every other method less the reference, in nats a token (nll) or as a share (correct).

    Raises ValueError where the reference or the metric is not known.
    """
    _check(reference, scores.methods, "reference")
    _check(metric, METRICS, "metric")
    values, weights = _values(scores, metric)
    base = scores.methods.index(reference)
    others = [m for m in range(len(scores.methods)) if m != base]
    if not others:
        return []
    found = _estimates([v[others] - v[base] for v in values], weights, resamples)
    separates = holm([found[-1].p_value(k) for k in range(len(others))])
    return [
        Difference(
            method=scores.methods[m],
            reference=reference,
            metric=metric,
            value=found[-1].interval(k),
            separates=separates[k],
            tasks=[
                TaskDifference(task=rows.task, value=found[t].interval(k))
                for t, rows in enumerate(scores.tasks)
            ],
        )
        for k, m in enumerate(others)
    ]


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses are rejected, with at most `level` for one false rejection among all."""
    rejected = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[place] > level / (len(p_values) - rank):
            break
        rejected[place] = True
    return rejected


@dataclass(frozen=True, slots=True)
class _Estimate:
    """K estimates and how they might have come out: mean (K,), draws (K, resamples)."""

    mean: Floats
    draws: Floats

    def interval(self, k: int, low: float = -np.inf, high: float = np.inf) -> Interval:
        """Mean and 95 % bounds, cut where the quantity ends."""
        bounds = np.quantile(self.draws[k], [LEVEL / 2, 1 - LEVEL / 2])
        mean = float(self.mean[k])
        return mean, max(low, min(mean, bounds[0])), min(high, max(mean, bounds[1]))

    def p_value(self, k: int) -> float:
        """Two-sided, against 0; a draw that is 0 speaks for both sides."""
        draws = self.draws[k]
        fewer = min(int(np.sum(draws <= 0)), int(np.sum(draws >= 0)))
        return min(1.0, 2 * (fewer + 1) / (len(draws) + 1))


def _values(scores: Scores, metric: str) -> tuple[list[Floats], list[Floats]]:
    """By task: what is summed (methods, seeds, examples), and what it is divided by (examples,)."""
    if metric == "nll":
        return [rows.nll for rows in scores.tasks], [rows.tokens for rows in scores.tasks]
    return [r.correct for r in scores.tasks], [np.ones(len(r.examples)) for r in scores.tasks]


def _estimates(values: list[Floats], weights: list[Floats], resamples: int) -> list[_Estimate]:
    """The estimate of each task, and last the mean over tasks. values: (K, seeds, examples)."""
    rng = np.random.default_rng(0)
    seeds = values[0].shape[1]
    tail = _student(seeds, resamples, rng)
    parts = [
        _part(v, w, _counts(len(w), resamples, rng)) for v, w in zip(values, weights, strict=True)
    ]
    total = _Part(
        *(np.mean([getattr(part, name) for part in parts], axis=0) for name in ("seeds", "shift")),
        *(
            np.sum([getattr(part, name) for part in parts], axis=0) / len(parts) ** 2
            for name in ("examples", "rest")
        ),
    )
    return [part.estimate(tail) for part in (*parts, total)]


@dataclass(frozen=True, slots=True)
class _Part:
    """K estimates on one task, or their mean over tasks.

    seeds: (K, S), the estimate of each seed. shift: (K, resamples), how far resampled examples move
    the mean over seeds. examples: (K,), the variance of that; rest: the part of it that is s_rest.
    """

    seeds: Floats
    shift: Floats
    examples: Floats
    rest: Floats

    def estimate(self, tail: Floats) -> _Estimate:
        mean = self.seeds.mean(axis=1)
        count = self.seeds.shape[1]
        if count == 1:
            return _Estimate(mean, mean[:, None] + self.shift)
        alone = np.clip(self.examples - self.rest, 0, None)
        ratio = np.divide(alone, self.examples, out=np.zeros_like(alone), where=self.examples > 0)
        error = self.seeds.std(axis=1, ddof=1) / np.sqrt(count)
        draws = mean[:, None] + np.sqrt(ratio)[:, None] * self.shift + error[:, None] * tail
        return _Estimate(mean, draws)


def _part(values: Floats, weights: Floats, counts: Iterable[Floats]) -> _Part:
    """One task; counts: how often each example is drawn, some resamples at a time."""
    examples, count = len(weights), values.shape[1]
    grow = np.sqrt(examples / (examples - 1))
    by_seed = values.sum(axis=2) / weights.sum()
    mean = by_seed.mean(axis=1)
    # What each example adds to the estimate's error, the ratio linearised.
    error = grow * (values - by_seed[:, :, None] * weights) / weights.sum()
    shared = error.mean(axis=1)
    rest = ((error - shared[:, None]) ** 2).sum(axis=(1, 2)) / (count * max(count - 1, 1))
    over_seeds = values.mean(axis=1).T
    drawn = np.concatenate([(c @ over_seeds) / (c @ weights)[:, None] for c in counts])
    return _Part(by_seed, grow * (drawn.T - mean[:, None]), (shared**2).sum(axis=1), rest)


def _counts(examples: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """(some resamples, examples) at a time: how often each example is drawn, `examples` in all."""
    size = max(1, CHUNK // examples)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = rng.integers(examples, size=(rows, examples))
        drawn += examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * examples)
        yield counts.reshape(rows, examples).astype(np.float64)


def _student(seeds: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Student's t with seeds - 1 degrees of freedom: its quantiles, in random order."""
    if seeds == 1:
        return np.zeros(resamples)
    shares = (np.arange(resamples) + 0.5) / resamples
    return rng.permutation(student.ppf(shares, seeds - 1)).astype(np.float64)


def _check(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r} is not among {', '.join(known)}")
