"""DPO with routed adapters: the ids of a pair reach both answers, in policy and reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import manylora
from manylora.adapter.layer import layers_of
from manylora.adapter.training import ManyLoraTrainerMixin, balance_loss
from manylora.corpus import CorpusError
from manylora.corpus.preferences import read_preferences
from tiny import attach, tiny_llama

PAIRS = [
    {"prompt": "sky", "chosen": " blue", "rejected": " green!", "branch_ids": 0},
    {"prompt": "the grass", "chosen": " green", "rejected": " blue", "branch_ids": 2},
]
BETA = 0.5


class Trainer(ManyLoraTrainerMixin, DPOTrainer):
    pass


def model_of(**config: Any) -> PeftModel:
    config = {"task_type": "CAUSAL_LM", "init_weights": False, **config}
    return attach(tiny_llama(vocab_size=300, attn_implementation="sdpa"), **config)


def trainer_of(tiny_folder: Path, out: Path, model: nn.Module, **arguments: Any) -> Trainer:
    rows = arguments.pop("rows", PAIRS)
    peft_config = arguments.pop("peft_config", None)
    fields: dict[str, Any] = {
        "beta": BETA,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "logging_steps": 1,
        "max_length": None,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=DPOConfig(output_dir=str(out), **fields | arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        peft_config=peft_config,
    )


def log_prob(model: nn.Module, tiny_folder: Path, prompt: str, answer: str) -> Tensor:
    """Of one answer, alone in its batch: no padding and no mates."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    start = len(tokenizer(prompt).input_ids)
    tokens = torch.tensor([tokenizer(prompt + answer + tokenizer.eos_token).input_ids])
    found = log_softmax(model(input_ids=tokens).logits[0, :-1], -1)
    return found.gather(1, tokens[0, 1:, None])[start - 1 :].sum()


def loss_by_hand(policy: PeftModel, reference: PeftModel, tiny_folder: Path) -> Tensor:
    """-log sigmoid(beta [(log pi/ref)(chosen) - (log pi/ref)(rejected)]), each pair by itself."""
    losses = []
    for row in PAIRS:
        ratio = {}
        for answer in ("chosen", "rejected"):
            given = (tiny_folder, str(row["prompt"]), str(row[answer]))
            with manylora.branch_ids(policy, int(row["branch_ids"])):
                mine = log_prob(policy, *given)
            with torch.no_grad(), manylora.branch_ids(reference, int(row["branch_ids"])):
                fixed = log_prob(reference, *given)
            ratio[answer] = mine - fixed
        losses.append(-logsigmoid(BETA * (ratio["chosen"] - ratio["rejected"])))
    return torch.stack(losses).mean()


def moved_on(model: PeftModel) -> None:
    """The policy after some training: no longer its reference."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_B.default" in name or "manylora_router.default" in name:
                parameter += 0.02 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(1)
                )


def first_batch(trainer: Trainer) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("precompute", [False, True], ids=["on the way", "precomputed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_loss_and_gradients_of_one_hot_are_those_computed_by_hand(
    tiny_folder: Path, tmp_path: Path, precompute: bool, checkpointing: bool
) -> None:
    config = {"method": "branch_per_cluster"}
    trainer = trainer_of(
        tiny_folder,
        tmp_path,
        model_of(**config),
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=checkpointing,
    )
    policy: Any = trainer.model
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    moved_on(policy)
    policy.train()
    loss = trainer.compute_loss(policy, first_batch(trainer))
    loss.backward()

    alone = model_of(**config)
    moved_on(alone)
    expected = loss_by_hand(alone, model_of(**config), tiny_folder)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    wanted = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    got = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(gradient, got[name], atol=2e-5), name


def test_only_the_branches_of_tasks_in_the_batch_learn(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_folder, tmp_path, model_of(method="branch_per_cluster"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, after in trainer.model.named_parameters():
        change = (after - before[name]).abs()
        if "manylora_B.default" in name:
            assert [bool(block.any()) for block in change.split(8, 1)] == [True, False, True]
        else:
            assert ".default." in name or not change.any()


def test_branch_ids_are_needed_where_the_method_needs_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]
    trainer = trainer_of(tiny_folder, tmp_path, model_of(method="branch_per_cluster"), rows=rows)
    with pytest.raises(ValueError, match="branch_ids"):
        trainer.train()


def test_ids_that_are_no_integers_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "branch_ids": [0, 1]} for row in PAIRS]
    trainer = trainer_of(tiny_folder, tmp_path, model_of(method="branch_per_cluster"), rows=rows)
    with pytest.raises(ValueError, match="one integer a row, got"):
        trainer.train()


@pytest.mark.parametrize("own_config", [True, False], ids=["peft_config", "PeftModel"])
def test_hydralora_learns_to_prefer_the_chosen_answer(
    tiny_folder: Path, tmp_path: Path, own_config: bool
) -> None:
    config = {"method": "hydralora", "task_type": "CAUSAL_LM"}
    base = tiny_llama(vocab_size=300, attn_implementation="sdpa")
    given = (
        {"model": base, "peft_config": manylora.ManyLoraConfig(**config)}
        if own_config
        else {"model": attach(base, **config)}
    )
    trainer = trainer_of(tiny_folder, tmp_path, **given, max_steps=15)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert float(log[0]["loss"]) == pytest.approx(0.6931, abs=1e-3)  # log 2: equal to the reference
    assert float(log[0]["rewards/accuracies"]) < 1.0
    late = log[-8:]
    assert sum(float(entry["rewards/accuracies"]) for entry in late) / len(late) > 0.8
    assert sum(float(entry["rewards/margins"]) for entry in late) / len(late) > 0.5


def test_balance_loss_is_the_policys_counted_once(tiny_folder: Path, tmp_path: Path) -> None:
    """The reference is a copy of the adapter, router included, and runs in training mode too."""
    config = {"method": "hydralora", "balance_loss": "switch"}
    losses = []
    for weight in (0.0, 7.0):
        trainer = trainer_of(tiny_folder, tmp_path, model_of(**config, balance_weight=weight))
        moved_on(trainer.model)
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, first_batch(trainer)))
        batch = first_batch(trainer)
    assert "ref" in layers_of(trainer.model)[0].branches
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    trainer.model(**tokens)
    expected = balance_loss(trainer.model)
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    assert balance_loss(trainer.model) == 0.0


def test_branch_dropout_drops_a_whole_pair(tiny_folder: Path, tmp_path: Path) -> None:
    """In the policy and in the reference, which is a copy of the adapter in the same layers."""
    model = model_of(method="branch_per_cluster", shared_rank=2, branch_dropout=0.5)
    trainer = trainer_of(tiny_folder, tmp_path, model)
    trainer.model.train()
    assert "ref" in layers_of(trainer.model)[0].branches
    found = set()
    for _ in range(20):
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        assert float(loss.detach()) == pytest.approx(0.6931, abs=1e-3)  # equal to the reference
        assert trainer.told_ids is not None
        chosen, rejected = trainer.told_ids.chunk(2)
        assert chosen.equal(rejected)
        found.update(int(one) for one in chosen)
    assert found == {-1, 0, 2}


def test_a_reference_that_is_computed_beforehand_drops_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = []
    for share in (0.0, 0.99):
        model = model_of(method="branch_per_cluster", shared_rank=2, branch_dropout=share).train()
        trainer = trainer_of(tiny_folder, tmp_path, model, precompute_ref_log_probs=True)
        rows.append([row["ref_chosen_logps"] for row in trainer.train_dataset])
    assert rows[0] == rows[1]


def test_evaluation_gives_the_ids_too(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_folder, tmp_path, model_of(method="branch_per_cluster"))
    scores = trainer.evaluate(trainer.train_dataset)
    assert scores["eval_loss"] == pytest.approx(0.6931, abs=1e-3)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tasks_of_a_file_become_branch_ids(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "pairs.jsonl", {**pair, "task": "y"}, {**pair, "task": "x"})
    assert read_preferences(path)["branch_ids"] == [1, 0]
    assert read_preferences(path, ["w", "x", "y"])["branch_ids"] == [2, 1]
    with pytest.raises(CorpusError, match="no branch stands for task 'x'"):
        read_preferences(path, ["y"])
    row = read_preferences(path)[0]
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    assert row["rejected"] == [{"role": "assistant", "content": "c"}]
    plain = write(tmp_path / "plain.jsonl", pair)
    assert "branch_ids" not in read_preferences(plain).column_names


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": 7, "chosen": "c", "rejected": "b"}, '"prompt" is 7'),
        (
            {
                "prompt": [{"role": "assistant", "content": "a"}],
                "chosen": "c",
                "rejected": "b",
            },
            "ends with the assistant's turn",
        ),
    ],
)
def test_bad_pair_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "pairs.jsonl", good, row)
    with pytest.raises(CorpusError, match=rf"pairs\.jsonl:2: .*{message}"):
        read_preferences(path)
