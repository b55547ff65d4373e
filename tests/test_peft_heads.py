"""Classifiers and other modules that PEFT trains whole beside an adapter: attached and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import manylora
from manylora.adapter.layer import layers_of
from manylora.adapter.saved_config import AdapterFileError
from tiny import VOCAB, attach, tiny_llama

X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"
BERT: dict[str, int] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
DISTIL: dict[str, int] = {
    "vocab_size": VOCAB,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 4,
    "hidden_dim": 24,
}


def llama() -> Any:
    config = tiny_llama().config
    config.pad_token_id = 0
    return config


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("SEQ_CLS", lambda: BertForSequenceClassification(BertConfig(**BERT))),
    "roberta": ("SEQ_CLS", lambda: RobertaForSequenceClassification(RobertaConfig(**BERT))),
    "distil": ("SEQ_CLS", lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL))),
    "llama": ("SEQ_CLS", lambda: LlamaForSequenceClassification(llama())),
    "bert_tokens": ("TOKEN_CLS", lambda: BertForTokenClassification(BertConfig(**BERT))),
    "llama_tokens": ("TOKEN_CLS", lambda: LlamaForTokenClassification(llama())),
    "bert_answers": ("QUESTION_ANS", lambda: BertForQuestionAnswering(BertConfig(**BERT))),
}
HEADS = {"classifier", "pre_classifier", "score", "qa_outputs"}
GIVEN = ["query", "value", "q_proj", "v_proj", "q_lin", "v_lin"]


def base(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind][1]().eval()


def trained(kind: str, **config: Any) -> PeftModel:
    """An adapter whose head was changed too."""
    model = attach(base(kind), task_type=MODELS[kind][0], init_weights=False, **config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            parameter.data.add_(1.0)
    return model


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return model(X)[0]


@pytest.mark.parametrize("targets", [GIVEN, "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_head_is_trained_whole_and_loaded_again(kind: str, targets: Any, tmp_path: Path) -> None:
    model = trained(kind, target_modules=targets)
    assert not {layer.own_name for layer in layers_of(model)} & HEADS
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), str(tmp_path))
    torch.testing.assert_close(scores(loaded), scores(model))
    loaded.load_adapter(str(tmp_path), "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(scores(loaded.eval()), scores(model))


@pytest.mark.parametrize("kind", ["bert", "llama", "bert_tokens", "bert_answers"])
def test_what_is_trained_and_saved_is_named_as_by_lora(kind: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type=MODELS[kind][0], target_modules=GIVEN)
    get_peft_model(base(kind), lora).save_pretrained(tmp_path / "lora")
    trained(kind, target_modules=GIVEN).save_pretrained(tmp_path / "own")
    others = [
        {name for name in load_file(tmp_path / folder / WEIGHTS) if "lora_" not in name}
        for folder in ("lora", "own")
    ]
    assert others[0] == others[1]


@pytest.mark.parametrize("part", ["classifier", "classifier.bias"])
def test_a_file_that_lost_its_head_is_refused(part: str, tmp_path: Path) -> None:
    trained("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if f".{part}" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / WEIGHTS)
    for trainable in (False, True):
        with pytest.raises(AdapterFileError, match=r"modules_to_save.*copy both") as error:
            PeftModel.from_pretrained(base("bert"), str(tmp_path), is_trainable=trainable)
        assert "classifier" in str(error.value)


def test_own_exclusions_stay_beside_the_head() -> None:
    for given in (["query"], r".*\.query"):
        model = trained("bert_tokens", exclude_modules=given)
        found = {layer.own_name for layer in layers_of(model)}
        assert found == {"key", "value", "dense"}


@pytest.mark.parametrize("make", [LoraConfig, manylora.ManyLoraConfig])
def test_a_loaded_configuration_can_start_another_adapter(make: Any, tmp_path: Path) -> None:
    """With another head and other ranks; the old file says nothing about it."""
    old = get_peft_model(tiny_llama(), make(target_modules=["q_proj"], r=2))
    old.save_pretrained(tmp_path)
    config = make.from_pretrained(str(tmp_path))
    config.modules_to_save, config.inference_mode, config.r = ["lm_head"], False, 2**14
    model = get_peft_model(tiny_llama(), config)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names
    assert any(tensor.shape[0] == 2**14 for name, tensor in model.named_parameters())


def test_a_classifiers_configuration_can_start_one_of_another_model(tmp_path: Path) -> None:
    trained("bert", target_modules=GIVEN).save_pretrained(tmp_path)
    config = manylora.ManyLoraConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    assert get_peft_model(base("llama"), config).base_model.model.score.modules_to_save
