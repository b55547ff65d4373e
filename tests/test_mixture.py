"""Shares and the order in which rows are drawn."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from manylora.corpus import CorpusError, DrawOrder, Mixture, shares
from manylora.corpus.mixture import permuted

SIZES = {"large": 100, "middle": 30, "small": 5}
MIXTURES = {
    "proportional": Mixture(),
    "balanced": Mixture(strategy="balanced"),
    "temperature": Mixture(strategy="temperature", temperature=2.0),
    "weights": Mixture(strategy="weights", weights={"large": 1, "middle": 1, "small": 2}),
}


def drawn(sizes: dict[str, int], mixture: Mixture, seed: int, epoch: int) -> list[tuple[str, int]]:
    starts = dict(zip(sizes, [0, *itertools.accumulate(sizes.values())], strict=False))
    owners = [task for task, size in sizes.items() for _ in range(size)]
    rows = DrawOrder(sizes, mixture, seed).epoch(epoch)
    return [(owners[row], row - starts[owners[row]]) for row in rows]


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_order_depends_on_seed_and_epoch(mixture: Mixture) -> None:
    order = drawn(SIZES, mixture, seed=3, epoch=0)
    assert drawn(SIZES, mixture, seed=3, epoch=0) == order
    assert drawn(SIZES, mixture, seed=4, epoch=0) != order
    assert drawn(SIZES, mixture, seed=3, epoch=1) != order
    assert len(order) == 135


def test_proportional_draws_each_row_exactly_once_an_epoch() -> None:
    for epoch in range(3):
        order = drawn(SIZES, Mixture(), seed=0, epoch=epoch)
        assert sorted(order) == [(task, row) for task in SIZES for row in range(SIZES[task])]


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_share_is_what_the_order_draws(mixture: Mixture) -> None:
    counts = Counter(task for task, _ in drawn(SIZES, mixture, seed=0, epoch=0))
    for task, share in shares(SIZES, mixture).items():
        assert counts[task] / 135 == pytest.approx(share, abs=1 / 135)


def test_shares_are_those_of_the_definitions() -> None:
    sizes = {"a": 400, "b": 100}
    found = {name: shares(sizes, m) for name, m in MIXTURES.items() if name != "weights"}
    assert found["proportional"] == {"a": 0.8, "b": 0.2}
    assert found["balanced"] == {"a": 0.5, "b": 0.5}
    assert found["temperature"]["a"] == pytest.approx(2 / 3)  # sqrt(400) : sqrt(100)
    assert shares(SIZES, MIXTURES["weights"]) == {"large": 0.25, "middle": 0.25, "small": 0.5}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_no_row_comes_again_before_the_others_of_its_task_have_come(mixture: Mixture) -> None:
    """Over epochs: a large task goes on where it stopped."""
    counts: Counter[tuple[str, int]] = Counter()
    for epoch in range(5):
        counts.update(drawn(SIZES, mixture, seed=0, epoch=epoch))
    for task, size in SIZES.items():
        times = [counts[task, row] for row in range(size)]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_tasks_are_interleaved(mixture: Mixture) -> None:
    sizes = dict.fromkeys(SIZES, 50)
    order = [task for task, _ in drawn(sizes, mixture, seed=0, epoch=0)]
    assert max(len(list(run)) for _, run in itertools.groupby(order)) < 20
    assert set(order[:20]) == set(SIZES)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_an_order_can_be_entered_anywhere(mixture: Mixture) -> None:
    order = DrawOrder(SIZES, mixture, 0)
    assert list(order.epoch(2, start=57)) == list(order.epoch(2))[57:]
    places = np.array([134, 0, 57], dtype=np.uint64)
    assert order.at(2, places).tolist() == [list(order.epoch(2))[i] for i in (134, 0, 57)]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_keyed_order_has_every_number_once(n: int, key: int) -> None:
    order = permuted(n, key, np.arange(n, dtype=np.uint64))
    assert sorted(order.tolist()) == list(range(n))


def test_a_keyed_order_is_random() -> None:
    """Where a number lands is uniform, and neighbours do not stay neighbours."""
    landed = np.array([permuted(10, key, np.array([3], dtype=np.uint64))[0] for key in range(4000)])
    counts = np.bincount(landed.astype(int), minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 33.7  # chi-squared, 9 degrees, p = 1e-4
    order = permuted(10_000, 7, np.arange(10_000, dtype=np.uint64)).astype(int)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_a_hundred_million_rows_cost_nothing_to_order() -> None:
    order = DrawOrder({"a": 90_000_000, "b": 10_000_000}, MIXTURES["temperature"], 0)
    rows = list(itertools.islice(order.epoch(0, start=50_000_000), 1000))
    assert len(set(rows)) == 1000
    assert 0.1 < sum(row >= 90_000_000 for row in rows) / 1000 < 0.4  # 1/4


def test_tasks_without_rows_and_weights_that_do_not_fit_are_errors() -> None:
    with pytest.raises(CorpusError, match="task 'b' has no training row left"):
        shares({"a": 3, "b": 0}, Mixture())
    with pytest.raises(CorpusError, match="no task to draw"):
        shares({}, Mixture())
    weights = Mixture(strategy="weights", weights={"a": 1, "z": 1})
    with pytest.raises(CorpusError, match=r"names z, and the tasks are a"):
        shares({"a": 3}, weights)
    with pytest.raises(CorpusError, match=r"no weight for task 'b'; it has a, z"):
        shares({"a": 3, "b": 3}, weights)


def test_a_task_of_tiny_weight_is_drawn_all_the_same() -> None:
    mixture = Mixture(strategy="weights", weights={"a": 1e9, "b": 1})
    order = drawn({"a": 10, "b": 10}, mixture, 0, 0)
    assert Counter(task for task, _ in order) == {"a": 19, "b": 1}


def test_short_forms_of_a_mixture() -> None:
    assert Mixture.model_validate("balanced") == MIXTURES["balanced"]
    assert Mixture.model_validate({"temperature": 2}) == MIXTURES["temperature"]
    weights = {"large": 1, "middle": 1, "small": 2}
    assert Mixture.model_validate({"weights": weights}) == MIXTURES["weights"]
    again = Mixture.model_validate(MIXTURES["temperature"].model_dump())
    assert again == MIXTURES["temperature"]


@pytest.mark.parametrize(
    "value",
    [
        "equal",
        {"temperature": 0},
        {"weights": {"a": -1}},
        {"strategy": "balanced", "temperature": 2},
        {"strategy": "weights"},
        {"temprature": 2},
        3,
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        Mixture.model_validate(value)
