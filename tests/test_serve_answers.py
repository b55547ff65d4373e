"""How tokens are drawn, how they become text, and what damaged requests lead to."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from manylora.base import load_tokenizer
from manylora.serve.limits import ApiError
from manylora.serve.protocol import ChatRequest, CompletionRequest, parse
from manylora.serve.sampling import LEAST, Sampling, choose, likelihoods
from manylora.serve.text import AnswerText
from request_fuzzing import CHAT, COMPLETION, mutated

LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()


def shares(temperature: float, top_p: float, draws: int = 4000) -> list[float]:
    """How often each token is drawn, by one request's own numbers."""
    row = Sampling(temperature, top_p, random.Random(0))
    tokens = choose(LOGITS.expand(draws, -1), [row] * draws)
    return (tokens.bincount(minlength=4) / draws).tolist()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.1, 0.25, 0.15], abs=0.03)


def test_temperature_sharpens() -> None:
    squared = torch.tensor([0.25, 0.01, 0.0625, 0.0225])
    assert shares(0.5, 1.0) == pytest.approx((squared / squared.sum()).tolist(), abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    assert shares(1.0, 0.7) == pytest.approx([2 / 3, 0, 1 / 3, 0], abs=0.03)
    assert shares(1.0, 0.4) == shares(1.0, 0.0) == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
def test_next_to_no_temperature_gives_the_likeliest(temperature: float) -> None:
    logits = torch.stack([LOGITS * 1e4, LOGITS.flip(0) * 1e4])
    rows = [Sampling(temperature, 1.0), Sampling(temperature, 1.0)]
    assert choose(logits, rows).tolist() == [0, 3]


def test_rows_are_drawn_each_in_its_own_way() -> None:
    """A seed draws the same numbers whatever the other rows are."""
    drawn = [
        [int(choose(LOGITS[None], [Sampling(1.0, 1.0, one)])[0]) for one in [random.Random(5)] * 20]
        for _ in range(2)
    ]
    mine = Sampling(1.0, 1.0, random.Random(5))
    mixed = []
    for _ in range(20):
        rows = [Sampling(), mine, Sampling(1.0, 1.0, random.Random(1))]
        greedy, token, _ = choose(LOGITS.expand(3, -1), rows).tolist()
        assert greedy == 0
        mixed.append(token)
    assert drawn == [mixed, mixed] and len(set(mixed)) > 1


def test_log_probabilities_are_of_the_model_and_finite() -> None:
    logits = torch.stack([LOGITS + 3, torch.tensor([0.0, -torch.inf, -1.0, -2.0])])
    none, found = likelihoods(logits, torch.tensor([2, 1]), [None, 4])
    assert none is None and found is not None
    assert (found.token, found.logprob, found.top[-1]) == (1, LEAST, (1, LEAST))
    (first,) = likelihoods(logits[:1], torch.tensor([2]), [2])
    assert first is not None and first.logprob == pytest.approx(float(LOGITS[2]))
    assert [token for token, _ in first.top] == [0, 2]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    """A token a byte, so that a character takes several."""
    return load_tokenizer(str(tiny_folder))


TEXTS = ["plain", "é中😀 and é", "中" * 10, "", "abab stop ababab", "😀"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "stop", [[], ["😀"], ["aba", "bs"], ["ababab"], ["b", "ab"], [" an"], ["stopping"]]
)
def test_pieces_make_the_text_up_to_its_stop(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]
) -> None:
    answer = AnswerText(tokenizer, stop)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(answer.add(token))
        if answer.stopped:
            break
    pieces.append(answer.end())
    ends = [text.index(s) for s in stop if s in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert answer.stopped == bool(ends)
    assert not any("�" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = AnswerText(tokenizer)
    ids = tokenizer("a中")["input_ids"][:-1]
    assert [answer.add(token) for token in ids] == ["a", "", ""]
    assert answer.end() == tokenizer.decode(ids)[1:]


VALID: list[tuple[Any, dict[str, Any]]] = [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)]


def test_ten_thousand_damaged_requests_are_read_or_refused() -> None:
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for number in range(10_000):
        kind, valid = VALID[number % 2]
        try:
            parse(kind, mutated(rng, valid))
            outcomes["read"] += 1
        except ApiError as error:
            assert error.status == 400 and str(error)
            json.dumps(error.body(), ensure_ascii=False).encode()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 1000, outcomes


@pytest.mark.parametrize(("kind", "valid"), VALID)
def test_what_a_request_may_say_is_read(kind: Any, valid: dict[str, Any]) -> None:
    read = parse(kind, json.dumps(valid).encode())
    assert read.limit == 5 and read.reported in (1, 2)
