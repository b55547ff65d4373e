"""A few held-out examples, token by token: where a router sends each of them.

    w_t  = mean over layers of g(x_t)          (tokens, N), for the token at place t
    w_tl = g(x_t) of layer l                   (tokens, N), for a few layers spread over the depth

Taken from the forward passes that score the run, while `RoutingMeter` watches them. Examples are
short ones, and long ones are cut, so that the file stays small whatever the model: the last
`PROMPT_TOKENS` of a prompt and the first `ANSWER_TOKENS` of its right answer. An answer's last
token is written and never read, so it has no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manylora.serve.text import AnswerText

EXAMPLES = 2
"""Of each task: one alone may be odd, and people do not read many."""
PROMPT_TOKENS, ANSWER_TOKENS = 40, 20
MOST_LAYERS = 4
MOST_NUMBERS = 30_000
"""Weights of single layers in all, each about six bytes of the file, and more on a page."""

Key = tuple[int, int]  # task, place among the task's examples


class Shown(TypedDict):
    """One example: its first token's place, its text token by token, w_t, and w_tl by layer."""

    start: int
    text: list[str]
    weights: list[list[float]]
    by_layer: list[list[list[float]]]


class Examples(TypedDict):
    """layers: those whose own weights are kept; tasks: the examples of each."""

    layers: list[str]
    tasks: dict[str, list[Shown]]


@dataclass
class _Part:
    """A prompt, or the answer to it. ids (n,); total (n, N) over the layers seen so far."""

    start: int
    ids: Tensor
    total: Tensor | float = 0.0
    layers: int = 0
    own: dict[str, Tensor] = field(default_factory=dict)


def shortest(lengths: Sequence[int]) -> list[int]:
    """Which rows of a task are shown: the places of the `EXAMPLES` shortest, first ones first."""
    return sorted(range(len(lengths)), key=lambda row: lengths[row])[:EXAMPLES]


class TokenRecorder:
    """Keeps the routing weights of shown examples; `layers` are all that will be seen."""

    def __init__(self, layers: Sequence[str], branches: int, tasks: int) -> None:
        each = EXAMPLES * (PROMPT_TOKENS + ANSWER_TOKENS) * max(tasks * branches, 1)
        kept = min(MOST_LAYERS, MOST_NUMBERS // each, len(layers))
        places = torch.linspace(0, len(layers) - 1, kept).round().int().tolist()
        self.layers = [layers[place] for place in places]
        self.parts: dict[Key, list[_Part]] = {}
        self._now: list[tuple[_Part, Tensor]] = []

    def begin(
        self, mask: Tensor, task_ids: Tensor, ids: Tensor, shown: Sequence[int | None]
    ) -> None:
        """The next forward pass; shown: for each row its place among the task's examples, or None.

        mask, ids: (batch, tokens). The first pass of an example reads its prompt, the second its
        answer.
        """
        self._now = []
        for row, place in enumerate(shown):
            if place is None:
                continue
            parts = self.parts.setdefault((int(task_ids[row]), place), [])
            real = mask[row].bool().cpu().nonzero().flatten()
            before = parts[0].start + len(parts[0].ids) if parts else 0
            cut = 0 if parts else max(len(real) - PROMPT_TOKENS, 0)
            some = real[:ANSWER_TOKENS] if parts else real[cut:]
            part = _Part(before + cut, ids[row].cpu()[some])
            parts.append(part)
            self._now.append((part, row * mask.shape[1] + some))

    def add(self, layer: str, weights: Tensor) -> None:
        """What a layer's router said in this pass: weights (batch * tokens, N)."""
        for part, places in self._now:
            own = weights[places.to(weights.device)].cpu()
            part.total, part.layers = part.total + own, part.layers + 1
            if layer in self.layers:
                part.own[layer] = own

    def examples(self, tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Examples:
        """What was kept, by the names of the tasks."""
        found: dict[str, list[Shown]] = {}
        for (task, _), parts in sorted(self.parts.items()):
            ids = torch.cat([part.ids for part in parts]).tolist()
            means = torch.cat([torch.as_tensor(part.total) / part.layers for part in parts])
            own = [torch.cat([part.own[layer] for part in parts]) for layer in self.layers]
            shown = Shown(
                start=parts[0].start,
                text=pieces(tokenizer, ids),
                weights=rounded(means, 3),
                by_layer=[rounded(weights, 2) for weights in own],
            )
            found.setdefault(tasks[task], []).append(shown)
        return Examples(layers=self.layers, tasks=found)


def rounded(weights: Tensor, digits: int) -> list[list[float]]:
    return [[round(value, digits) for value in row] for row in weights.tolist()]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at its last one."""
    special = set(tokenizer.all_special_ids)
    text = AnswerText(tokenizer)
    found = [
        str(tokenizer.decode([token])) if token in special else text.add(token) for token in ids
    ]
    found[-1] += text.end()
    return found
