"""What a comparison reads of a batch is what any other way of scoring gives."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn

from manylora.adapter.ids import branch_ids
from manylora.comparison.reading import read, sums_by_row
from manylora.comparison.trainer import has_own_tokens, prepared
from manylora.corpus.batches import Collator, Row
from manylora.evaluate.answers import Question, score_answers
from tiny import attach, tiny_llama

ROWS = [
    Row(input_ids=[5, 9, 7, 30, 31, 2], learned=[(3, 6)], task_id=0, source="a:1"),
    Row(input_ids=[5, 40, 2], learned=[(1, 3)], task_id=1, source="b:1"),
    Row(input_ids=[8, 8, 11, 12, 13, 14, 15, 50, 2], learned=[(7, 9)], task_id=1, source="b:2"),
]


def batch(rows: list[Row] = ROWS) -> dict[str, torch.Tensor]:
    made = Collator(pad_token_id=0)(rows)
    return {k: made[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")}


def moved(model: nn.Module) -> nn.Module:
    """The model with every trained tensor moved away from its start."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def peft_models() -> dict[str, nn.Module]:
    causal = {"task_type": TaskType.CAUSAL_LM}
    modules = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {
        "plain": tiny_llama(),
        "manylora": attach(tiny_llama(), method="hydralora", r=2),
        "lora": get_peft_model(tiny_llama(), LoraConfig(r=2, **modules, **causal)),
        "dora": get_peft_model(tiny_llama(), LoraConfig(r=2, use_dora=True, **modules, **causal)),
        "ia3": get_peft_model(
            tiny_llama(), IA3Config(feedforward_modules=["down_proj"], **modules, **causal)
        ),
    }


@pytest.mark.parametrize("name", list(peft_models()))
def test_sums_are_those_of_scoring_each_answer(name: str) -> None:
    model = moved(peft_models()[name])
    tokens, nll, right = sums_by_row(read(model, batch()))
    questions = [
        Question(row["input_ids"][:start], [row["input_ids"][start:stop]], 0, 0)
        for row in ROWS
        for start, stop in row["learned"]
    ]
    scores = [found[0] for found in score_answers(model, questions, 0)]
    assert tokens.tolist() == [score.tokens for score in scores]
    torch.testing.assert_close(
        nll, torch.tensor([-s.log_likelihood for s in scores]).double(), atol=2e-5, rtol=1e-5
    )
    assert right.tolist() == [score.greedy for score in scores]


def test_branches_by_task_read_with_their_own_branch() -> None:
    model = moved(attach(tiny_llama(), method="branch_per_cluster", num_branches=2, r=2))
    with branch_ids(model, [0, 1, 1]):
        together = sums_by_row(read(model, batch()))[1]
    for row, expected in zip(ROWS, together.tolist(), strict=True):
        with branch_ids(model, [row["task_id"]]):
            assert sums_by_row(read(model, batch([row])))[1].item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_methods_with_tokens_of_their_own_read_a_row_the_same_alone_and_in_a_batch(
    kind: type,
) -> None:
    config = kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = get_peft_model(tiny_llama(), config)
    assert has_own_tokens(model)
    moved(model)

    def read_rows(rows: list[Row]) -> tuple[torch.Tensor, ...]:
        inputs, _ = prepared(Collator(pad_token_id=0)(rows), use_ids=False, before_text=True)
        return sums_by_row(read(model, inputs))

    together = read_rows(ROWS)
    for place, row in enumerate(ROWS):
        alone = read_rows([row])
        assert alone[0].item() == together[0][place]
        assert alone[1].item() == pytest.approx(together[1][place].item(), abs=1e-5)


def test_the_loss_is_the_mean_over_answer_tokens_or_over_those_of_the_step() -> None:
    model = tiny_llama().eval()
    found = read(model, batch())
    assert found.losses.shape == (7,)
    assert found.loss.item() == pytest.approx(found.losses.mean().item())
    assert read(model, batch(), items=70).loss.item() == pytest.approx(
        found.losses.sum().item() / 70
    )


def test_adalora_adds_its_own_loss() -> None:
    config = AdaLoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], total_step=10, init_r=4, target_r=2
    )
    model = get_peft_model(tiny_llama(), config)
    found = read(model, batch())
    extra = found.loss - found.losses.mean()
    assert extra.item() > 1e-4
    assert extra.requires_grad
