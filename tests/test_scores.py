"""Scores against answers worked out by hand, and against generation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from manylora.base import load_model, load_tokenizer
from manylora.corpus import Corpus, DataOptions, Encoder, Example, load_corpus
from manylora.evaluate.answers import Question, generate_answers, score_answers
from manylora.evaluate.held_out import evaluate_run
from manylora.evaluate.scores import closed_answers, held_out, interval, score_tasks
from manylora.evaluate.table import METRIC_TITLES, print_scores, verdict
from manylora.evaluate.text import bleu, is_text, rouge_l, text_scores, token_f1
from manylora.inspect.routing import RoutingMeter
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach

PROMPTS = [[5, 9, 30, 7], [11, 12], [40, 41, 42, 43, 44, 45, 46]]
ANSWERS = [[8, 20, 0], [33, 0], [9, 9, 9, 0]]


def by_hand(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    logits: Tensor = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    predicted = torch.log_softmax(logits.double(), -1)
    likelihood = predicted[range(len(answer)), answer].sum()
    return float(likelihood), predicted.argmax(-1).tolist() == answer


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answer_scores_equal_one_plain_forward_pass(tiny_folder: Path, batch_size: int) -> None:
    model = attach(load_model(str(tiny_folder)), method="hydralora", init_weights=False).eval()
    questions = [Question(prompt, ANSWERS, i, 0) for i, prompt in enumerate(PROMPTS)]
    scores = score_answers(model, questions, 0, batch_size)
    for prompt, found in zip(PROMPTS, scores, strict=True):
        for answer, score in zip(ANSWERS, found, strict=True):
            likelihood, greedy = by_hand(model, prompt, answer)
            assert score.log_likelihood == pytest.approx(likelihood, abs=1e-4)
            assert score.greedy == greedy
            assert score.tokens == len(answer)


def test_greedy_means_what_generation_writes(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    written = generate_answers(model, PROMPTS, 0, [0], 3)
    questions = [Question(p, [a[:3]], 0, 0) for p, a in zip(PROMPTS, written, strict=True)]
    assert all(found[0].greedy for found in score_answers(model, questions, 0))
    other = [Question(q.prompt, [[*q.answers[0][:-1], 50]], 0, 0) for q in questions]
    assert not any(found[0].greedy for found in score_answers(model, other, 0))


def test_generation_ignores_batch_mates_and_stops_at_its_own_limit(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    together = generate_answers(model, PROMPTS, 0, [0], [2, 5, 3], batch_size=3)
    alone = [
        generate_answers(model, [p], 0, [0], n)[0] for p, n in zip(PROMPTS, [2, 5, 3], strict=True)
    ]
    assert together == alone
    assert [len(answer) for answer in together] == [2, 5, 3]


def example(number: int, answer: str) -> Example:
    question, reply = {"role": "user", "content": f"q? {number}"}, {"role": "assistant"}
    return Example("t", [question, {**reply, "content": answer}], f"t:{number}")  # type: ignore[list-item]


def test_perfect_model_scores_one_and_its_opposite_zero(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake model that puts all its weight on the right answer, or none."""
    from manylora.evaluate import scores as module
    from manylora.evaluate.answers import AnswerScore

    rows = [example(i, "yes" if i % 2 else "no") for i in range(20)]
    corpus = Corpus({"t": rows}, {"t": rows})
    tasks, _ = held_out(corpus, Encoder(load_tokenizer(str(tiny_folder)), 200), 20)
    assert tasks[0].choices == ["no", "yes"]
    for right, expected in ((True, 1.0), (False, 0.0)):

        def fake(
            _model: object, questions: list[Question], *_: object, right: bool = right
        ) -> list[list[AnswerScore]]:
            return [
                [
                    AnswerScore(-1.0 if (i == q.gold) == right else -9.0, 2, (i == q.gold) == right)
                    for i in range(len(q.answers))
                ]
                for q in questions
            ]

        monkeypatch.setattr(module, "score_answers", fake)
        result = score_tasks(None, load_tokenizer(str(tiny_folder)), tasks, ["t"])["t"]  # type: ignore[arg-type]
        assert result["choice_accuracy"] == [expected] * 3
        assert result["exact_match"] == [expected] * 3
        assert result["nll"] == [0.5 if right else 4.5] * 3


def test_closed_answers_need_few_repeated_ones_that_cover_the_test_rows() -> None:
    def rows(*answers: str) -> list[Example]:
        return [example(i, answer) for i, answer in enumerate(answers)]

    assert closed_answers(rows(*["a", "b"] * 4), rows("a")) == ["a", "b"]
    assert closed_answers(rows(*["a", "b"] * 4), rows("c")) == []
    assert closed_answers(rows(*["a", "b"] * 3), rows("a")) == []
    assert closed_answers(rows(*["a"] * 9), rows("a")) == []
    assert closed_answers(rows(*[str(i) for i in range(21)] * 4), rows("3")) == []


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b", "a b", 1.0),
        ("A b c", "a b", 0.8),
        ("x", "a", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a a", "a", 2 / 3),
    ],
)
def test_token_f1(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat was under the bed", "the cat was found under the bed", 12 / 13),
        ("d c b a", "a b c d", 0.25),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("running", "run", 0.0),
        ("кот спал здесь", "кот не спал", 2 / 3),
        ("", "a", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    answer: str, reference: str, expected: float
) -> None:
    assert rouge_l([answer], [reference]) == [pytest.approx(expected)]


def test_rouge_l_of_english_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("It's a well-known fact: 3.5 of 10", "It is well known: 3 of ten!"), ("a_b c", "A b")]
    for answer, reference in pairs:
        theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l([answer], [reference]) == [theirs]
        assert 0 < theirs < 1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # precisions of 1 to 4 words; no brevity penalty
        ("the cat sat on the mat", "the cat sat on a mat", (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("the cat sat on", "the cat sat on a mat", math.exp(1 - 6 / 4)),
        ("hello there", "hello there", 1.0),
        ("Hello there", "hello there", (1 / 2 * 1 / 2) ** 0.5),  # cased; the 2-gram smoothed
        ("end.", "end .", 1.0),  # 13a splits off punctuation
        ("x y", "a b", 0.0),
        ("", "a", 0.0),
        ("", "", 1.0),
    ],
)
def test_bleu_is_smoothed_sentence_bleu(answer: str, reference: str, expected: float) -> None:
    assert bleu([answer], [reference]) == [pytest.approx(expected, abs=1e-9)]


def test_answers_are_text_when_half_of_them_have_three_words() -> None:
    assert is_text(["one two three", "one", "and so on"])
    assert not is_text(["one two three", "one", "two"])
    assert set(text_scores(["a"], ["b"])) == {"token_f1"}
    scores = text_scores(["one two three", "x"], ["one two three", "four five six"])
    assert scores == {metric: [1.0, 0.0] for metric in ("token_f1", "rouge_l", "bleu")}


@pytest.mark.parametrize(
    ("answers", "metrics"),
    [
        ("red green blue", {"token_f1", "rouge_l", "bleu"}),
        ("red", {"token_f1"}),
    ],
)
def test_an_open_tasks_answers_are_written_once_and_scored_in_every_way(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, answers: str, metrics: set[str]
) -> None:
    """A model that writes the right answer to every row but the first, where it writes nothing."""
    from manylora.evaluate import scores as module

    tokenizer = load_tokenizer(str(tiny_folder))
    rows = [example(i, f"{answers}{i}") for i in range(4)]
    tasks, _ = held_out(Corpus({"t": rows}, {"t": rows}), Encoder(tokenizer, 200), 20)
    calls = []

    def write(_: object, prompts: list[list[int]], *rest: object) -> list[list[int]]:
        calls.append(len(prompts))
        right = [tokenizer.encode(row.output, add_special_tokens=False) for row in rows]
        return [[], *right[1:]]

    monkeypatch.setattr(module, "generate_answers", write)
    model = load_model(str(tiny_folder))
    result = score_tasks(model, tokenizer, tasks, ["t"])["t"]
    assert calls == [4]
    assert set(result) == {"nll", "exact_match"} | metrics
    decoded = tokenizer.decode(tokenizer.encode(rows[1].output, add_special_tokens=False))
    assert decoded == rows[1].output
    for metric in metrics:
        assert result[metric][0] == pytest.approx(0.75)


def test_the_table_and_the_page_show_every_metric_by_its_name(tmp_path: Path) -> None:
    from manylora.report.files import Scores, TaskScores
    from manylora.report.page import metric_views

    values = {metric: [0.5, 0.4, 0.6] for metric in METRIC_TITLES}
    task = {"n": 9, "before": values, "after": values}
    (tmp_path / "scores.json").write_text(json.dumps({"tasks": {"t": task}}))
    printed = StringIO()
    print_scores(tmp_path, Console(file=printed, width=120))
    titles = [view.title for view in metric_views(Scores(tasks={"t": TaskScores(**task)}))]
    assert titles == list(METRIC_TITLES.values())
    assert {"ROUGE-L", "BLEU, 0 to 1"} < set(titles)
    assert all(title in printed.getvalue() for title in titles)


def test_a_long_name_takes_lines_and_no_numbers(tmp_path: Path) -> None:
    name = "1-age_limit-card_about_to_expire-cash_withdrawal_charge-and_what_else_is_asked"
    task = {"n": 1234, "before": {"nll": [2.5, 2, 3]}, "after": {"nll": [0.75, 0.5, 1.25]}}
    (tmp_path / "scores.json").write_text(json.dumps({"tasks": {name: task}}))
    printed = StringIO()
    print_scores(tmp_path, Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    numbers = [line.split()[1:] for line in lines if "NLL" in line]
    assert [" ".join(words) for words in numbers] == [
        "1234 NLL, nats/token 2.50 0.75 0.50 to 1.25 better"
    ]
    assert "".join(line[:20].split(" ")[1] for line in lines[3:] if line.strip()) == name


def test_interval_is_the_percentile_bootstrap_of_the_mean() -> None:
    values = [0.0, 1.0] * 50
    mean, low, high = interval(values)
    assert mean == 0.5
    # The normal approximation of the mean of 100 fair coins: 0.5 +- 1.96 * 0.05.
    assert low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)
    assert interval(values) == [mean, low, high]
    assert interval([0.25, 0.25]) == [0.25, 0.25, 0.25]


def test_verdict_needs_the_whole_interval_beyond_the_score_before() -> None:
    assert verdict("nll", [2.0, 1.0, 3.0], [1.0, 0.5, 1.9]) == "better"
    assert verdict("nll", [2.0, 1.0, 3.0], [1.0, 0.5, 2.1]) == ""
    assert verdict("exact_match", [0.2, 0.1, 0.3], [0.5, 0.21, 0.7]) == "better"
    assert verdict("exact_match", [0.5, 0.1, 0.9], [0.2, 0.1, 0.4]) == "worse"


def test_routing_means_are_those_of_the_router_over_real_tokens(tiny_folder: Path) -> None:
    model = attach(load_model(str(tiny_folder)), method="hydralora", init_weights=False).eval()
    questions = [
        Question(p, [a], 0, i % 2) for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    together = RoutingMeter(model, ["a", "b", "unused"])
    score_answers(model, questions, 0, batch_size=3, meter=together)
    alone = RoutingMeter(model, ["a", "b", "unused"])
    score_answers(model, questions, 0, batch_size=1, meter=alone)
    first, second = together.result(), alone.result()
    assert first is not None and second is not None
    assert list(first["tasks"]) == ["a", "b"]
    for task in ("a", "b"):
        one, other = torch.tensor(first["tasks"][task]), torch.tensor(second["tasks"][task])
        assert torch.allclose(one, other, atol=1e-5)
        assert torch.allclose(one.sum(-1), torch.ones(len(one)).to(one), atol=1e-6)


def test_evaluating_again_gives_the_same_scores(make_recipe: Callable[..., Recipe]) -> None:
    run = train(make_recipe())
    before = (run / "scores.json").read_text()
    (run / "scores.json").unlink()
    evaluate_run(run, Console(stderr=True))
    assert (run / "scores.json").read_text() == before


def test_rows_that_are_not_scored_are_said(tiny_folder: Path, task_folder: Path) -> None:
    corpus = load_corpus(task_folder, DataOptions(holdout=0.2))
    tasks, notes = held_out(corpus, Encoder(load_tokenizer(str(tiny_folder)), 24), 100)
    assert [task.name for task in tasks] == ["colour", "copy", "parity"]
    assert any("colour" in note and "not scored" in note for note in notes)
    assert all(len(task.examples) == len(task.encoded) for task in tasks)
