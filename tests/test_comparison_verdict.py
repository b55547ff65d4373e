"""What a comparison says in sentences: each is there when it holds, and only then."""

from __future__ import annotations

import pytest

from compared import compared, info
from manylora.comparison.result import (
    Difference,
    Interval,
    MethodScore,
    RatePoint,
    TaskDifference,
)
from manylora.comparison.verdict import joined, verdict


def apart(
    method: str, value: Interval, separates: bool, tasks: list[Interval], metric: str = "nll"
) -> Difference:
    return Difference(
        method=method,
        reference="lora",
        metric=metric,
        value=value,
        separates=separates,
        tasks=[TaskDifference(task=f"t{i}", value=task) for i, task in enumerate(tasks)],
    )


def said(*differences: Difference, seeds: int = 3, **changes: object) -> list[str]:
    """The verdict's lines; changes: fields of the reference's info."""
    names = dict.fromkeys(["lora", *(d.method for d in differences)])
    infos = [info(name, **(changes if name == "lora" else {})) for name in names]
    flat = (1.0, 0.9, 1.1)
    scores = [MethodScore(method=n, seeds=seeds, nll=flat, correct=flat, tasks=[]) for n in names]
    return verdict("lora", infos, scores, differences).splitlines()


NONE = apart("dora", (0.004, -0.01, 0.018), False, [(0.004, -0.01, 0.018)])
BETTER = apart(
    "hydralora",
    (-0.021, -0.03, -0.012),
    True,
    [(-0.04, -0.06, -0.02), (-0.04, -0.06, -0.02), (-0.01, -0.02, 0.01), (0.006, -0.01, 0.02)],
)


def test_no_method_separates() -> None:
    assert said(NONE) == [
        "No method separates from lora on these tasks.",
        "That is not proof of equality: differences of up to 0.018 nats a token stay possible.",
    ]


def test_a_better_method_is_said_with_its_interval_and_tasks() -> None:
    assert said(BETTER) == [
        "hydralora is better than lora: 0.021 nats a token lower (95 %: 0.012 to 0.030), "
        "on 3 of 4 tasks."
    ]


def test_a_worse_method_is_said_with_the_tasks_that_speak_against_it() -> None:
    worse = apart("dora", (0.1, 0.05, 0.15), True, [(0.4, 0.3, 0.5), (-0.2, -0.3, -0.1)])
    assert said(worse) == [
        "dora is worse than lora: 0.100 nats a token higher (95 %: 0.050 to 0.150), "
        "on 1 of 2 tasks, but better on t1."
    ]


def test_the_best_stands_first_and_the_rest_are_named() -> None:
    worse = apart("adalora", (0.1, 0.05, 0.15), True, [(0.4, 0.3, 0.5)])
    lines = said(worse, NONE, BETTER)
    assert [line.split()[0] for line in lines[:3]] == ["hydralora", "adalora", "dora"]
    assert lines[2] == "dora does not separate from lora."


def test_the_share_of_right_answers_has_its_own_sentence() -> None:
    share = apart("dora", (-0.051, -0.08, -0.02), True, [(-0.05, -0.1, -0.01)], "correct")
    same = apart("dora", (0.01, -0.02, 0.03), False, [(0.01, -0.02, 0.03)], "correct")
    assert said(NONE, share)[0] == "No method separates from lora on these tasks, by nll."
    assert said(NONE, share)[-1] == (
        "By the share of right answers, dora is worse by 5.1 points (95 %: 2.0 to 8.0)."
    )
    assert said(NONE, same)[-1] == "By the share of right answers none separates."
    assert said(NONE, same)[0] == "No method separates from lora on these tasks."


def test_one_seed_is_said_and_so_are_two() -> None:
    assert said(NONE, seeds=1)[-1].startswith("Seeds were not repeated: the intervals are over ex")
    assert said(NONE, seeds=2)[-1].startswith("With two seeds the intervals are very wide")
    assert "eeds" not in " ".join(said(NONE, seeds=3))


def test_a_method_off_the_budget_is_said_on_either_side() -> None:
    assert said(NONE, budget_share=0.04)[-1] == (
        "Not at equal parameters: lora has 4 % of the budget."
    )
    assert "lora has 123 % of the budget" in said(NONE, budget_share=1.234)[-1]
    assert "lora has 0.012 % of the budget" in said(NONE, budget_share=0.00012)[-1]
    assert "Not at equal" not in " ".join(said(NONE, budget_share=0.96))


def test_a_best_rate_at_the_edge_is_said_with_its_end() -> None:
    assert "for lora (0.004, the highest)." in said(NONE, at_edge=True, best_lr=4e-3)[-1]
    assert "for lora (0.00025, the lowest)." in said(NONE, at_edge=True, best_lr=2.5e-4)[-1]
    assert "edge" not in " ".join(said(NONE))


def test_wider_rates_are_named_where_they_were_not_tried() -> None:
    tried = [{"lr": 4e-3 / 2**i, "nll": 1.0 + i, "correct": 0.5} for i in range(7)]
    for count, named in ((5, True), (7, False)):
        rates = [RatePoint(**one) for one in tried[:count]]
        last = said(NONE, at_edge=True, best_lr=4e-3, rates=rates)[-1]
        assert "lora (0.004, the highest)." in last
        assert ("With --wider-rates two more are tried there." in last) == named


def test_the_reference_alone_is_compared_with_nothing() -> None:
    assert said() == ["There is no method to compare with lora."]


def test_differences_against_another_method_are_refused() -> None:
    with pytest.raises(ValueError, match="differences are against lora, not dora"):
        verdict("dora", [info("dora")], [], [NONE])


def test_simulated_methods_get_the_verdict_of_their_effects() -> None:
    lines = compared(effects={"lora": 0.0, "ia3": 0.14, "dora": 0.0}).verdict.splitlines()
    assert lines[0].startswith("ia3 is worse than lora: 0.1")
    assert lines[1] == "dora does not separate from lora."
    assert "Not at equal parameters: ia3 has 4 % of the budget." in lines


def test_names_are_joined_as_in_a_sentence() -> None:
    assert joined(["a"]) == "a"
    assert joined(["a", "b"]) == "a and b"
    assert joined(["a", "b", "c"]) == "a, b and c"
