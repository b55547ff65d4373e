"""Rows to scores: the checks, the estimates, and by simulation what the intervals promise."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from compared import rows, table
from manylora.comparison.intervals import differences, holm, summarise
from manylora.comparison.rows import SCHEMA, Scores, TaskRows

TWO = {"lora": 0.0, "hydralora": -0.03}


def scores(effects: dict[str, float] = TWO, seeds: int = 3, **kwargs: float) -> Scores:
    return Scores.of(rows(effects, seeds=seeds, **kwargs))


def small(method: str, seed: int, task: str, nll: list[float], tokens: list[int]) -> pa.Table:
    names = [f"{task}:{i}" for i in range(len(nll))]
    return table(method, seed, task, names, tokens, nll, [x < 2 for x in nll])


@pytest.fixture
def by_hand() -> pa.Table:
    """Two methods, two seeds, two tasks, with sums that can be done in the head."""
    parts = []
    for seed, more in ((0, 0.0), (1, 2.0)):
        parts += [
            small("lora", seed, "a", [1.0, 3.0 + more], [1, 3]),
            small("lora", seed, "b", [4.0, 4.0], [2, 2]),
            small("ia3", seed, "a", [5.0, 7.0 + more], [1, 3]),
            small("ia3", seed, "b", [6.0, 6.0], [2, 2]),
        ]
    return pa.concat_tables(parts)


def test_nll_weighs_tokens_within_a_task_and_tasks_alike(by_hand: pa.Table) -> None:
    lora, ia3 = summarise(Scores.of(by_hand))
    assert [t.nll[0] for t in lora.tasks] == [(4 / 4 + 6 / 4) / 2, 2.0]
    assert lora.nll[0] == (1.25 + 2.0) / 2
    assert [t.correct[0] for t in lora.tasks] == [0.5, 0.0]
    assert lora.correct[0] == 0.25
    assert ia3.nll[0] == (3.25 + 3.0) / 2
    assert (lora.method, lora.seeds, lora.tasks[0].n) == ("lora", 2, 2)
    assert all(s.nll[1] <= s.nll[0] <= s.nll[2] for s in (lora, ia3))


def test_a_difference_is_the_method_less_the_reference(by_hand: pa.Table) -> None:
    (nll,) = differences(Scores.of(by_hand), "lora", "nll")
    assert (nll.method, nll.reference) == ("ia3", "lora")
    assert [t.value[0] for t in nll.tasks] == pytest.approx([2.0, 1.0])
    assert nll.value[0] == pytest.approx(1.5)
    (share,) = differences(Scores.of(by_hand), "lora", "correct")
    assert share.value[0] == pytest.approx(-0.25)
    (other,) = differences(Scores.of(by_hand), "ia3", "nll")
    assert other.value[0] == pytest.approx(-1.5)


def test_what_two_methods_share_is_not_in_their_difference() -> None:
    own = summarise(scores(examples=40))[0].nll
    apart = differences(scores(examples=40), "lora", "nll")[0].value
    assert apart[2] - apart[1] < 0.5 * (own[2] - own[1])


def test_order_of_rows_and_of_runs_changes_nothing() -> None:
    given = rows(TWO, seeds=2)
    shuffled = given.take(np.random.default_rng(0).permutation(given.num_rows))
    want = {(s.method, t.task): t.nll for s in summarise(Scores.of(given)) for t in s.tasks}
    have = {(s.method, t.task): t.nll for s in summarise(Scores.of(shuffled)) for t in s.tasks}
    assert {key: value[0] for key, value in have.items()} == pytest.approx(
        {key: value[0] for key, value in want.items()}
    )


def test_twice_the_same_is_the_same_to_the_last_digit() -> None:
    assert summarise(scores()) == summarise(scores())
    assert differences(scores(), "lora", "nll") == differences(scores(), "lora", "nll")


def test_a_method_against_its_copy_is_zero_and_does_not_separate() -> None:
    lora = rows({"lora": 0.0})
    names = pc.replace_substring(lora["method"], "lora", "copy")
    copy = lora.set_column(SCHEMA.get_field_index("method"), "method", names)
    for metric in ("nll", "correct"):
        (found,) = differences(Scores.of(pa.concat_tables([lora, copy])), "lora", metric)
        assert found.value == (0.0, 0.0, 0.0) and not found.separates


def test_one_seed_is_the_plain_bootstrap_over_examples() -> None:
    found = scores(seeds=1, examples=400)
    rows_ = found.tasks[0]
    error = (rows_.nll[0, 0] - rows_.tokens * (rows_.nll[0, 0].sum() / rows_.tokens.sum())).std()
    width = 2 * 1.96 * error * np.sqrt(400) / rows_.tokens.sum()
    _, low, high = summarise(found)[0].tasks[0].nll
    assert high - low == pytest.approx(width, rel=0.05)


def test_seeds_that_differ_widen_the_interval_by_students_t() -> None:
    parts = []
    for seed, nll in enumerate((1.0, 2.0, 3.0)):
        parts.append(small("lora", seed, "a", [nll] * 50, [1] * 50))
    mean, low, high = summarise(Scores.of(pa.concat_tables(parts)))[0].nll
    reach = 4.3027 / np.sqrt(3)  # t(0.975; 2) x sd 1 / sqrt(3 seeds)
    assert mean == 2.0 and high == pytest.approx(2 + reach, rel=0.01)
    assert low == pytest.approx(max(0.0, 2 - reach), abs=0.02)


def simulated(random: np.random.Generator, methods: int, seeds: int, sds: list[float]) -> Scores:
    """Methods that are alike in truth, nll 3; sds: of seeds, seeds by task, examples, the rest."""
    seed, by_task, example, rest = sds
    over_all = random.normal(0, seed, (methods, seeds, 1))
    tasks = []
    for task in range(3):
        tokens = random.integers(1, 30, 40).astype(float)
        own = example * (random.exponential(1.0, (methods, 1, 40)) - 1)  # skewed, as losses are
        each = 3 + random.normal(0, 0.3, 40) + over_all + own
        each = each + random.normal(0, by_task, (methods, seeds, 1))
        each = each + random.normal(0, rest, (methods, seeds, 40))
        tasks.append(
            TaskRows(str(task), list(map(str, range(40))), tokens, each * tokens, (each < 3) * 1.0)
        )
    return Scores([f"m{i}" for i in range(methods)], list(range(seeds)), tasks)


NOISE = {
    "seeds": [0.02, 0.0, 0.1, 0.1],
    "examples": [0.0, 0.0, 0.3, 0.1],
    "both": [0.03, 0.02, 0.2, 0.2],
    "neither": [0.0, 0.0, 0.05, 0.5],
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_and_false_separations_are_rare(seeds: int, noise: str) -> None:
    random = np.random.default_rng(7)
    covered, families, level = [], [], []
    for trial in range(200):
        found = simulated(random, 8, seeds, NOISE[noise])
        metric = "correct" if trial % 3 == 0 else "nll"
        against = differences(found, "m0", metric, resamples=1000)
        covered += [d.value[1] <= 0 <= d.value[2] for d in against]
        families.append(any(d.separates for d in against))
        level += [s.nll[1] <= 3 <= s.nll[2] for s in summarise(found, resamples=500)]
    assert 0.92 <= np.mean(covered) <= 0.99
    assert 0.92 <= np.mean(level) <= 0.99
    assert np.mean(families) <= 0.07


def test_one_seed_would_not_cover_what_seeds_change() -> None:
    random = np.random.default_rng(7)
    covered = []
    for _ in range(100):
        found = simulated(random, 8, 1, NOISE["both"])
        covered += [d.value[1] <= 0 <= d.value[2] for d in differences(found, "m0", "nll", 1000)]
    assert np.mean(covered) < 0.9


def test_a_large_effect_separates_and_a_small_one_does_not() -> None:
    effects = {"lora": 0.0, "ia3": 0.14, "dora": 0.0001}
    ia3, dora = differences(scores(effects), "lora", "nll")
    assert ia3.separates and ia3.value[1] > 0.1
    assert not dora.separates


def test_separates_is_never_looser_than_the_interval() -> None:
    random = np.random.default_rng(3)
    seen = set()
    for _ in range(60):
        found = simulated(random, 5, 3, [0.01, 0.0, 0.1, 0.1])
        found.tasks[0].nll[1] += 0.2 * found.tasks[0].tokens
        for d in differences(found, "m0", "nll", 1000):
            beyond = not d.value[1] <= 0 <= d.value[2]
            seen.add((d.separates, beyond))
    assert (True, True) in seen and (False, True) in seen
    assert (True, False) not in seen


def test_holm_steps_down_and_stops_at_the_first_that_holds() -> None:
    assert holm([0.04, 0.001, 0.02, 0.015]) == [True, True, True, True]
    assert holm([0.04, 0.001, 0.03, 0.02]) == [False, True, False, False]
    assert holm([0.04]) == [True]
    assert holm([]) == []


def test_rate_rows_are_left_out() -> None:
    tuned = table("lora", 0, "cuad", ["x:0"], [1], [99.0], [True], stage="rate")
    alone = rows(TWO)
    assert summarise(Scores.of(pa.concat_tables([tuned, alone]))) == summarise(Scores.of(alone))


def test_a_missing_cell_is_named() -> None:
    every = rows(TWO)
    gone = (every["method"].to_numpy() == "hydralora") & (every["seed"].to_numpy() == 2)
    gone &= every["task"].to_numpy() == "gsm8k"
    with pytest.raises(ValueError, match="hydralora, seed 2 has no rows of task 'gsm8k'; 1 of 24"):
        Scores.of(every.filter(pa.array(~gone)))


def test_other_examples_and_other_answers_are_named() -> None:
    lora = small("lora", 0, "a", [1.0, 2.0, 3.0], [1, 2, 3])
    fewer = small("ia3", 0, "a", [1.0, 2.0], [1, 2])
    with pytest.raises(ValueError, match=r"ia3, seed 0, task 'a' has 2 examples .* 'a:2' only one"):
        Scores.of(pa.concat_tables([lora, fewer]))
    longer = small("ia3", 0, "a", [1.0, 2.0, 3.0], [1, 2, 4])
    with pytest.raises(ValueError, match=r"ia3, seed 0, task 'a' has answers of another .*'a:2'"):
        Scores.of(pa.concat_tables([lora, longer]))
    with pytest.raises(ValueError, match="lora, seed 0, task 'a' has the example 'a:0' twice"):
        Scores.of(pa.concat_tables([lora, lora]))
    with pytest.raises(ValueError, match="task 'a' has 1 example; an interval needs two"):
        Scores.of(lora.slice(0, 1))


def test_two_runs_of_one_seed_are_named() -> None:
    lora = small("lora", 0, "a", [1.0, 2.0], [1, 2])
    again = lora.set_column(0, "run", pa.array(["other", "other"]))
    with pytest.raises(ValueError, match="lora, seed 0 has 2 runs: lora-0-test, other"):
        Scores.of(pa.concat_tables([lora, again]))


def test_a_run_that_diverged_is_named() -> None:
    broken = small("ia3", 1, "a", [1.0, float("nan")], [1, 2])
    with pytest.raises(ValueError, match=r"ia3, seed 1 \(run ia3-1-test\) has 1 rows .* diverged"):
        Scores.of(broken)


def test_tables_that_are_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks the columns .*nll"):
        Scores.of(pa.table({"run": ["a"]}))
    with pytest.raises(ValueError, match="none of the 1 rows is of stage 'test'"):
        Scores.of(table("lora", 0, "a", ["x"], [1], [1.0], [True], stage="rate"))
    with pytest.raises(ValueError, match="answer of 0 tokens"):
        Scores.of(small("lora", 0, "a", [0.0, 1.0], [0, 1]))
    with pytest.raises(ValueError, match="column 'nll' has 1 empty"):
        Scores.of(
            small("lora", 0, "a", [0.0, 1.0], [1, 1]).set_column(
                SCHEMA.get_field_index("nll"), "nll", pa.array([None, 1.0], pa.float64())
            )
        )


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(ValueError, match="reference 'dora' is not among lora, hydralora"):
        differences(scores(), "dora", "nll")
    with pytest.raises(ValueError, match="metric 'f1' is not among nll, correct"):
        differences(scores(), "lora", "f1")


def test_alone_a_method_differs_from_nothing() -> None:
    assert differences(scores({"lora": 0.0}), "lora", "nll") == []
