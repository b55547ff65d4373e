"""How the tasks are mixed: their shares, and the order in which rows are drawn.

    proportional      each row once an epoch; a task's share is rows / all rows
    balanced          each task equally often
    temperature: T    share proportional to rows ** (1 / T); 1 is proportional, large is balanced
    weights: {..}     the given shares, scaled to sum 1

An epoch draws as many rows as there are, whatever the shares, and the next one draws anew: a large
task goes on with rows that it has not given yet, a small one starts again when all of its rows have
come. Where a row stands is computed from (seed, epoch, position) alone: nothing is ever listed or
shuffled in memory, so an order over any number of rows costs nothing and can be entered anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from manylora.corpus.layouts import CorpusError

Strategy = Literal["proportional", "balanced", "temperature", "weights"]
Rows = npt.NDArray[np.uint64]

_ROUNDS = 6
_CHUNK = 8192


class Mixture(BaseModel):
    """The recipe's `mixture`: a strategy's name, `{temperature: T}` or `{weights: {task: w}}`."""

    model_config = ConfigDict(extra="forbid")

    strategy: Strategy = "proportional"
    temperature: float | None = Field(None, gt=0)
    weights: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"strategy": value}
        if isinstance(value, dict) and "strategy" not in value:
            named = [key for key in ("temperature", "weights") if value.get(key) is not None]
            return {**value, "strategy": named[0]} if named else value
        return value

    @model_validator(mode="after")
    def _fits(self) -> Mixture:
        for name in ("temperature", "weights"):
            given = getattr(self, name) is not None
            if given != (self.strategy == name):
                raise ValueError(
                    f"strategy={self.strategy!r} and {name}={getattr(self, name)!r} do not fit: "
                    f"{name} is for strategy={name!r} alone"
                )
        if self.weights is not None and not all(
            0 < weight < float("inf") for weight in self.weights.values()
        ):
            raise ValueError(
                f"weights={self.weights} must be positive numbers; leave out the files of a task "
                "that is not to be trained"
            )
        return self


def shares(rows: dict[str, int], mixture: Mixture) -> dict[str, float]:
    """Each task's expected part of the rows that a step draws; they sum to 1.

    Raises CorpusError for a task without rows, and for weights that do not name the tasks.
    """
    if not rows:
        raise CorpusError("there is no task to draw rows from. Give at least one task file.")
    for task, count in rows.items():
        if count < 1:
            raise CorpusError(
                f"task {task!r} has no training row left. Add rows, raise max_length if its rows "
                "were too long, or leave the task out."
            )
    raw = {task: _raw_share(task, count, mixture) for task, count in rows.items()}
    if mixture.weights is not None and (unknown := sorted(set(mixture.weights) - set(rows))):
        raise CorpusError(
            f"mixture.weights names {', '.join(unknown)}, and the tasks are {', '.join(rows)}."
        )
    total = sum(raw.values())
    return {task: share / total for task, share in raw.items()}


def _raw_share(task: str, rows: int, mixture: Mixture) -> float:
    if mixture.temperature is not None:
        return float(rows ** (1 / mixture.temperature))
    if mixture.weights is not None:
        if task not in mixture.weights:
            raise CorpusError(
                f"mixture.weights has no weight for task {task!r}; it has "
                f"{', '.join(mixture.weights) or 'none'}. Give one for every task."
            )
        return mixture.weights[task]
    return 1.0 if mixture.strategy == "balanced" else float(rows)


class DrawOrder:
    """Row numbers in the order in which an epoch draws them; tasks lie one after the other.

    Args:
        rows: how many rows each task has; task i's rows are numbered from the sum of those before.
        mixture, seed: what the order depends on, beside the epoch.
    """

    def __init__(self, rows: dict[str, int], mixture: Mixture, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.length = sum(rows.values())
        self.draws = _apportion(shares(rows, mixture), self.length)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[int]:
        """The rows of one epoch, from the given position on."""
        for first in range(start, self.length, _CHUNK):
            positions = np.arange(first, min(first + _CHUNK, self.length), dtype=np.uint64)
            yield from self.at(epoch, positions).tolist()

    def at(self, epoch: int, positions: Rows) -> Rows:
        """The rows at the given positions of an epoch."""
        slots = permuted(self.length, _key(self.seed, epoch), positions)
        result = np.zeros_like(slots)
        first_slot = first_row = 0
        for task, rows in self.rows.items():
            draws = self.draws[task]
            mine = (slots >= first_slot) & (slots < first_slot + draws)
            drawn = slots[mine] - np.uint64(first_slot) + np.uint64(epoch * draws)
            passes, place = drawn // np.uint64(rows), drawn % np.uint64(rows)
            keys = _mixed(passes + np.uint64(_key(self.seed, task)))
            result[mine] = permuted(rows, keys, place) + np.uint64(first_row)
            first_slot, first_row = first_slot + draws, first_row + rows
        return result


def permuted(n: int, key: int | Rows, positions: Rows) -> Rows:
    """What a keyed random order of range(n) has at the given positions, without making the order.

    A Feistel network over the next power of four, walked until it falls below n (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002). key: one, or one for each position.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), positions.shape)
    result = _feistel(positions, keys, half)
    while len(outside := np.flatnonzero(result >= n)):
        result[outside] = _feistel(result[outside], keys[outside], half)
    return result


def _feistel(values: Rows, keys: Rows, half: np.uint64) -> Rows:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(_ROUNDS):
        salt = np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
        left, right = right, left ^ (_mixed(right + keys + salt) & mask)
    return (left << half) | right


def _mixed(values: Rows) -> Rows:
    """splitmix64's finaliser: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(values: Rows, salt: str) -> Rows:
    """The values in a random order of their own: each hashed with the salt."""
    return _mixed(values + np.uint64(_key(salt)))


def _key(*parts: object) -> int:
    """The same on every machine, and unrelated for other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _apportion(share: dict[str, float], length: int) -> dict[str, int]:
    """Whole draws for each task, at least one, that sum to `length` (largest remainders)."""
    exact = {task: part * length for task, part in share.items()}
    draws = {task: max(1, int(value + 1e-9)) for task, value in exact.items()}
    by_remainder = sorted(share, key=lambda task: (draws[task] - exact[task], task))
    missing = length - sum(draws.values())
    for task in by_remainder[: max(0, missing)]:
        draws[task] += 1
    for _ in range(-missing):  # the ones given to tiny shares
        draws[max(draws, key=lambda task: draws[task])] -= 1
    return draws
