"""The answers of a batch as any model reads them: one forward pass, teacher-forced.

Works on a PEFT model of any method and on a plain one. Only the positions before an answer's token
are projected to the vocabulary. The loss is put where the base model would put its own, so that a
method that adds to it (AdaLoRA's orthogonality) does so in its own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from manylora.corpus import IGNORED


@dataclass(frozen=True)
class Answers:
    """loss: what training minimises. losses: -log p of each answer's token in nats, right: whether
    it is the likeliest; both in the order of `learned`, (batch, tokens), which is true where the
    next token is an answer's."""

    loss: Tensor
    losses: Tensor
    right: Tensor
    learned: Tensor


def read(model: nn.Module, inputs: dict[str, Any], items: Any = None) -> Answers:
    """Read a batch (input_ids, attention_mask, position_ids, labels).

    items: answer tokens of the whole step, by which the summed loss is divided; default: those of
    this batch.
    """
    labels: Tensor = inputs["labels"]
    learned = pad(labels[:, 1:] != IGNORED, (0, 1))
    wanted = labels[:, 1:][learned[:, :-1]]
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found: list[tuple[Tensor, Tensor]] = []

    def only_answers(head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        virtual = given[0].shape[1] - labels.shape[1]  # a prompt method's own tokens, in front
        return (given[0][:, virtual:][learned],)

    forward, is_own = base.forward, "forward" in vars(base)

    def with_loss(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        logits = output.logits.float()
        losses = cross_entropy(logits, wanted, reduction="none")
        found.append((losses, logits.detach().argmax(-1) == wanted))
        output.loss = losses.mean() if items is None else losses.sum() / items
        return output

    hook = base.get_output_embeddings().register_forward_pre_hook(only_answers)
    base.forward = with_loss  # not a hook: AdaLoRA's model calls `forward` itself
    try:
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        loss: Tensor = model(**given, use_cache=False).loss
    finally:
        hook.remove()
        del base.forward
        if is_own:
            base.forward = forward
    losses, right = found[0]
    return Answers(loss, losses, right, learned)


def sums_by_row(answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """(answer tokens, -log p in nats, whether every token is right) of each row, on the CPU."""
    rows = answers.learned.nonzero()[:, 0]
    count = answers.learned.shape[0]
    tokens = torch.bincount(rows, minlength=count)
    zero = torch.zeros(count, dtype=torch.float64)
    nll = zero.index_add(0, rows.cpu(), answers.losses.detach().double().cpu())
    wrong = zero.index_add(0, rows.cpu(), (~answers.right).double().cpu())
    return tokens.cpu(), nll, wrong == 0
