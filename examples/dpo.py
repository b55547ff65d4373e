"""Preference training (DPO) of a routed adapter with TRL, offline on the bundled samples.

    python examples/dpo.py                                     # HydraLoRA: a router for each token
    python examples/dpo.py --method branch_per_cluster         # one branch for each task
    python examples/dpo.py --pairs pairs.jsonl                 # your own pairs

A line of pairs.jsonl: {"prompt": "...", "chosen": "...", "rejected": "...", "task": "support"};
without `task`, all pairs train all branches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from trl import DPOConfig, DPOTrainer

import manylora
from manylora.adapter.training import ManyLoraTrainerMixin
from manylora.base import DEFAULT_MODEL, load_model, load_tokenizer
from manylora.corpus import samples_path
from manylora.corpus.preferences import Preference, preference_dataset, read_preferences
from manylora.corpus.readers import read_examples, task_files


class Trainer(ManyLoraTrainerMixin, DPOTrainer):
    """TRL's trainer, which now gives each pair's `branch_ids` to the adapter."""


def sample_pairs(split: str, rows: int) -> list[Preference]:
    """The right answer is chosen; the rejected one answers another question of the task."""
    pairs: list[Preference] = []
    for task, files in task_files(samples_path() / split).items():
        examples = [
            e for file in files for e in read_examples(file) if not isinstance(e, ValueError)
        ]
        for example in examples[:rows]:
            wrong = next(e for e in examples if e.output != example.output)
            pairs.append(
                Preference(
                    prompt=example.prompt,
                    chosen=example.messages[-1:],
                    rejected=wrong.messages[-1:],
                    task=task,
                )
            )
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="hydralora")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/dpo"))
    given = parser.parse_args()

    train = (
        preference_dataset(sample_pairs("train", rows=48))
        if given.pairs is None
        else read_preferences(given.pairs)
    )
    held_out = preference_dataset(sample_pairs("test", rows=4)) if given.pairs is None else None
    branches = len(set(train["branch_ids"])) if "branch_ids" in train.column_names else None
    trainer = Trainer(
        model=load_model(given.model),
        processing_class=load_tokenizer(given.model),
        # The reference is the model without its adapter, so no second model is in memory.
        peft_config=manylora.ManyLoraConfig(
            method=given.method, num_branches=branches, r=8, task_type="CAUSAL_LM"
        ),
        args=DPOConfig(
            output_dir=str(given.output),
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            max_length=256,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.train()
    if held_out is not None:
        scores = trainer.evaluate()
        accuracy = scores["eval_rewards/accuracies"]
        print(f"held-out pairs where the chosen answer is preferred: {accuracy:.0%}")
    trainer.save_model(str(given.output))
    print(f"adapter saved to {given.output}")


if __name__ == "__main__":
    main()
