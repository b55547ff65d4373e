"""The mixing table and the order in which rows are drawn."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from rich.console import Console

from manylora.corpus import (
    CorpusError,
    Encoded,
    Strategy,
    mixture_table,
    print_mixture,
    sample_order,
)

SIZES = {"small": 5, "large": 100, "middle": 30}
STRATEGIES: list[Strategy] = ["proportional", "balanced"]


def encoded(task: str, count: int) -> list[Encoded]:
    return [Encoded(task, [1, 2, 3, 4, 5], prompt_length=3) for _ in range(count)]


def longest_run(order: list[tuple[str, int]]) -> int:
    longest = run = 1
    for (before, _), (task, _) in itertools.pairwise(order):
        run = run + 1 if task == before else 1
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_depends_on_seed_and_epoch_and_not_on_the_order_of_tasks(
    strategy: Strategy,
) -> None:
    order = sample_order(SIZES, strategy, seed=3, epoch=0)
    assert sample_order(SIZES, strategy, seed=3, epoch=0) == order
    assert sample_order(dict(sorted(SIZES.items())), strategy, seed=3, epoch=0) == order
    assert sample_order(SIZES, strategy, seed=4, epoch=0) != order
    assert sample_order(SIZES, strategy, seed=3, epoch=1) != order


def test_proportional_draws_each_row_exactly_once() -> None:
    order = sample_order(SIZES, "proportional", seed=0, epoch=0)
    assert sorted(order) == [(task, row) for task in sorted(SIZES) for row in range(SIZES[task])]


def test_tasks_are_interleaved_and_not_one_after_the_other() -> None:
    proportional = sample_order({"a": 50, "b": 50, "c": 50}, "proportional", seed=0, epoch=0)
    assert longest_run(proportional) < 15
    assert {task for task, _ in proportional[:15]} == {"a", "b", "c"}
    assert longest_run(sample_order(SIZES, "balanced", seed=0, epoch=0)) <= 2


def test_balanced_draws_each_task_equally_often_in_every_round() -> None:
    order = sample_order(SIZES, "balanced", seed=0, epoch=0)
    assert Counter(task for task, _ in order) == dict.fromkeys(SIZES, 45)
    for start in range(0, len(order), 3):
        assert {task for task, _ in order[start : start + 3]} == set(SIZES)


def test_balanced_repeats_no_row_before_the_others_have_come() -> None:
    rows = Counter(sample_order(SIZES, "balanced", seed=0, epoch=0))
    assert {rows["small", row] for row in range(5)} == {9}
    assert all(count == 1 for (task, _), count in rows.items() if task == "large")
    assert {rows["middle", row] for row in range(30)} == {1, 2}


def test_balanced_draws_other_rows_of_a_large_task_in_the_next_epoch() -> None:
    first, second = (
        {
            row
            for task, row in sample_order(SIZES, "balanced", seed=0, epoch=epoch)
            if task == "large"
        }
        for epoch in (0, 1)
    )
    assert first != second


def test_the_table_counts_rows_and_tokens_and_says_the_share() -> None:
    train = {"b": encoded("b", 3), "a": encoded("a", 1)}
    assert mixture_table(train) == [
        {"task": "a", "rows": 1, "tokens": 5, "answer_tokens": 2, "share": 0.25},
        {"task": "b", "rows": 3, "tokens": 15, "answer_tokens": 6, "share": 0.75},
    ]
    assert [row["share"] for row in mixture_table(train, "balanced")] == [0.5, 0.5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_share_is_what_the_order_draws(strategy: Strategy) -> None:
    table = mixture_table({task: encoded(task, size) for task, size in SIZES.items()}, strategy)
    order = sample_order(SIZES, strategy, seed=0, epoch=0)
    drawn = Counter(task for task, _ in order)
    for row in table:
        assert row["share"] == pytest.approx(drawn[row["task"]] / len(order))


def test_the_printed_table_has_every_task_and_the_sums() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        print_mixture(mixture_table({"a": encoded("a", 1000), "b": encoded("b", 3000)}), console)
    text = captured.get()
    for expected in ("a ", "1,000", "25.0%", "75.0%", "2 tasks", "4,000", "20,000", "100.0%"):
        assert expected in text


def test_tasks_without_rows_and_unknown_strategies_are_errors() -> None:
    with pytest.raises(CorpusError, match="task 'b' has no training row left"):
        sample_order({"a": 3, "b": 0}, "proportional", seed=0, epoch=0)
    with pytest.raises(CorpusError, match="no task to draw"):
        mixture_table({})
    with pytest.raises(CorpusError, match=r"'equal' is not known. Choose one of: proportional"):
        sample_order({"a": 3}, "equal", seed=0, epoch=0)  # type: ignore[arg-type]
