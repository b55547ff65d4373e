"""A trainer's evaluation, prediction and generation with a data set's `branch_ids`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import manylora
from tiny import attach, tiny_llama

IDS = [0, 1, 2, -1, 1]
TOKENS = [[3, 4, 5, 6], [7, 8, 9, 10], [3, 9, 2, 5], [6, 6, 1, 4], [8, 2, 7, 3]]
LABELS = [[5, 6], [7, 3], [2, 2], [9, 4], [8, 5]]
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_eval_batch_size": 2,
}


class Plain(manylora.ManyLoraTrainerMixin, Trainer):
    pass


class Generating(manylora.ManyLoraTrainerMixin, Seq2SeqTrainer):
    pass


def rows(labels: list[list[int]] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"input_ids": tokens, "branch_ids": i} for tokens, i in zip(TOKENS, IDS, strict=True)
    ]
    if labels is not None:
        found = [{**row, "labels": own} for row, own in zip(found, labels, strict=True)]
    return found


def adapted(model: torch.nn.Module, **config: Any) -> PeftModel:
    return attach(
        model, method="branch_per_cluster", shared_rank=2, init_weights=False, **config
    ).eval()


def t5() -> PeftModel:
    sizes: dict[str, int] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=40, decoder_start_token_id=0, initializer_factor=20.0, **sizes)
        )
    return adapted(model, task_type="SEQ_2_SEQ_LM")


@pytest.mark.parametrize("labels", [None, TOKENS])
def test_predictions_are_those_of_each_rows_branch(tmp_path: Path, labels: Any) -> None:
    model = adapted(tiny_llama(), task_type="CAUSAL_LM")
    trainer = Plain(model=model, args=TrainingArguments(output_dir=str(tmp_path), **QUIET))
    found = trainer.predict(rows(labels))
    with torch.no_grad(), manylora.branch_ids(model, IDS):
        expected = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected.logits)
    if labels is not None:
        # The last batch has one row of five, which the trainer weighs by rows.
        assert found.metrics["test_loss"] == pytest.approx(float(expected.loss), rel=1e-4)
        assert trainer.evaluate(rows(labels))["eval_loss"] == found.metrics["test_loss"]


def test_an_id_that_is_no_branch_is_still_refused(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), task_type="CAUSAL_LM")
    trainer = Plain(model=model, args=TrainingArguments(output_dir=str(tmp_path), **QUIET))
    with pytest.raises(ValueError, match=r"ids must be in -1..2"):
        trainer.predict([{"input_ids": [3, 4], "branch_ids": 3}] * 2)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_generation_uses_each_rows_branch_for_all_its_beams(
    tmp_path: Path, beams: int, labels: Any
) -> None:
    model = t5()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, **QUIET
    )
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams}
    found = Generating(model=model, args=arguments).predict(rows(labels), **options).predictions
    for row, own, i in zip(found, TOKENS, IDS, strict=True):
        with manylora.branch_ids(model, i):
            expected = model.generate(input_ids=torch.tensor([own]), **options)[0]
        assert row[: len(expected)].tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) > 1
