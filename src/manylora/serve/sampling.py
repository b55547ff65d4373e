"""The next token of each row of a batch, drawn as its request wants it, and how likely it was.

    p = softmax(logits / temperature), cut to the likeliest tokens that make up top_p (Holtzman et
    al., arXiv 1904.09751); the token is where u in [0, 1) falls in the running sum of p

u comes from the request's own random numbers, so a seed gives the same answer whoever is in the
batch. Log-probabilities are the model's, before temperature and top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

LEAST = -9999.0
"""OpenAI's value for a token that cannot come; JSON has no minus infinity."""


@dataclass
class Sampling:
    """temperature 0: the likeliest token. random: the request's own numbers."""

    temperature: float = 0.0
    top_p: float = 1.0
    random: Random = field(default_factory=Random)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-probability of a chosen token, in nats, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def choose(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Token ids (rows,) for logits (rows, vocabulary), on the same device."""
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        places = torch.tensor(drawn, device=logits.device)
        tokens[places] = _draw(logits[places].float(), [rows[i] for i in drawn])
    return tokens


def _draw(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    temperature = column([max(row.temperature, 1e-6) for row in rows])
    # The largest becomes 0 before the division, which then cannot overflow to infinity.
    scaled = (logits - logits.max(-1, keepdim=True).values) / temperature
    p, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= column([row.top_p for row in rows]), 0)
    reached = p.cumsum(-1)
    u = column([row.random.random() for row in rows]) * reached[:, -1:]
    place = (reached <= u).sum(-1, keepdim=True)
    # Where top_p is 0 nothing is left, and the likeliest, the first, is taken.
    last = ((p > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(-1, place.minimum(last))[:, 0]


def likelihoods(
    logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]
) -> list[Likelihood | None]:
    """For each row that wants it, with so many of the likeliest tokens; None: it does not."""
    found: list[Likelihood | None] = [None] * len(wanted)
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return found
    places = torch.tensor(rows, device=logits.device)
    logprobs = logits[places].float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[places, None])[:, 0].tolist()
    most = max(count for count in wanted if count is not None)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), -1)
    for i, logprob, token, top, top_ids in zip(
        rows, chosen, tokens[places].tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        pairs = [(t, max(v, LEAST)) for t, v in zip(top_ids, top, strict=True)]
        found[i] = Likelihood(token, max(logprob, LEAST), pairs[: wanted[i]])
    return found
