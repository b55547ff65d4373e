"""What a training step asks of a model's modules; nothing else is changed by asking less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from manylora.training.walks import ShortWalksMixin
from tiny import VOCAB, tiny_llama

STEPS = 4
ROWS = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))


class Short(ShortWalksMixin, Trainer):
    pass


def adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    config.init_lora_weights = False
    return get_peft_model(tiny_llama(), config)


def trained(kind: type[Trainer], model: nn.Module, folder: Path, **options: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    callbacks = options.pop("callbacks", [])
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4}
    settings |= {"learning_rate": 0.01, "report_to": "none", "save_strategy": "no", "seed": 0}
    settings |= {"disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.1, **options}
    arguments = TrainingArguments(str(folder), **settings)
    trainer = kind(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_as_without_it(tmp_path: Path, accumulation: int) -> None:
    options = {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    ours, theirs = adapted(0.2), adapted(0.2)
    before = {name: p.clone() for name, p in weights(ours).items()}
    short = trained(Short, ours, tmp_path, **options)
    plain = trained(Trainer, theirs, tmp_path, **options)
    torch.testing.assert_close(weights(ours), weights(theirs))
    assert not any(torch.equal(before[name], p) for name, p in weights(ours).items())
    norms = [
        [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        for trainer in (short, plain)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and min(norms[0]) > 0.1  # so it clips


def test_a_step_does_not_ask_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()

    class Step(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            asked[f"step {len(asked)}"] = asked.pop("now", 0)

    def counted(name: str) -> None:
        original = getattr(nn.Module, name)

        def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            asked["now"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, counting)

    counted("train")
    counted("_named_members")  # of which parameters() is made
    model = adapted()
    trained(Short, model, tmp_path, callbacks=[Step()])
    short = [asked[f"step {i}"] for i in range(1, STEPS)]
    asked.clear()
    trained(Trainer, adapted(), tmp_path, callbacks=[Step()])
    plain = [asked[f"step {i}"] for i in range(1, STEPS)]
    assert max(short) < 5
    assert min(plain) > len(list(model.modules()))  # what is counted is what a step does


def test_a_model_in_eval_mode_is_switched_back_by_the_next_step(tmp_path: Path) -> None:
    modes: list[tuple[bool, bool]] = []

    class Switch(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            last = list(model.modules())[-1]
            modes.append((model.training, last.training))
            model.eval()

    trained(Short, adapted().eval(), tmp_path, callbacks=[Switch()])
    assert modes == [(True, True)] * STEPS


def test_the_model_is_as_it_was_afterwards(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = adapted()
    trained(Short, model, tmp_path)
    assert not {"train", "zero_grad"} & set(vars(model))
    with pytest.raises(KeyboardInterrupt):
        trained(Short, model, tmp_path, callbacks=[Stop()])
    assert not {"train", "zero_grad"} & set(vars(model))
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.eval().modules())
