"""The weights of adapters for which a loss is least, found without gradients.

    w = argmin over [-1.5, 1.5]^n of  NLL(w) + 0.05 mean_i |w_i|

by nevergrad's NGOpt from w = 0, as in LoraHub's code (arXiv 2307.13269, sail-sg/lorahub). The
penalty is a mean as there; the paper has a sum. Departures from the code: the NLL is a mean over
the examples, where it also divides by their number, so that its penalty weighs more; the best point
that was tried is taken, w = 0 being one, where nevergrad may recommend one that was not.

Up to 50 trials for each weight NGOpt is COBYLA, which draws no random numbers. Beyond, it fits
models to the trials, which nevergrad 1.0.12 cannot do with numpy 2.4 or newer (TypeError).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from manylora.training.progress import finite

BOUND = 1.5
PENALTY = 0.05
TRIALS_PER_WEIGHT = 50


@dataclass(frozen=True)
class Trial:
    """One vector of weights; nll: nats a token on the examples; loss: with the penalty."""

    weights: list[float]
    nll: float
    loss: float

    def plain(self) -> dict[str, Any]:
        """For JSON: a loss that is not finite is null."""
        return {"weights": self.weights, "nll": finite(self.nll), "loss": finite(self.loss)}


def search(
    nll: Callable[[Sequence[float]], float],
    count: int,
    budget: int,
    seed: int,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Every trial in order: all `count` weights 0, then `budget` of NGOpt's.

    nll: of a vector of weights. tell: is given each trial when it is done.
    """
    import nevergrad

    trials: list[Trial] = []

    def loss(weights: list[float]) -> float:
        found = nll(weights)
        penalty = PENALTY * sum(abs(weight) for weight in weights) / count
        trials.append(Trial(weights, found, found + penalty))
        tell(trials[-1])
        return trials[-1].loss

    loss([0.0] * count)
    space = nevergrad.p.Array(init=np.zeros(count), lower=-BOUND, upper=BOUND)
    space.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(space, budget=budget)
    try:
        with warnings.catch_warnings():
            # Of a tolerance that nevergrad sets itself, and of a loss that is not finite.
            warnings.simplefilter("ignore")
            for _ in range(budget):
                candidate = optimizer.ask()
                optimizer.tell(candidate, loss([float(weight) for weight in candidate.value]))
    finally:
        del optimizer  # ends its thread, which else waits for ever where an error is kept
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest loss, the first of equals; one that is not finite is never it."""
    return min(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)


def watched_search(
    nll: Callable[[Sequence[float]], float], count: int, budget: int, seed: int, console: Console
) -> list[Trial]:
    """`search`, showing how far it is, the time left and the best loss so far."""
    bar = Progress(
        TextColumn("trying weights"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
        console=console,
    )
    done: list[Trial] = []
    with bar:
        task = bar.add_task("weights", total=budget + 1, best="")

        def tell(trial: Trial) -> None:
            done.append(trial)
            bar.update(task, advance=1, best=f"best loss {best_of(done).loss:.3f}")

        return search(nll, count, budget, seed, tell)
