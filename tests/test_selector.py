"""The branch selector: chooses from the prompt, travels with the adapter, and is used by itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

import manylora
from branch_prompts import IDS, NAMES, PROMPTS, RANGES, fitted, prompt
from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.selector import BranchSelector
from manylora.adapter.state import BranchState
from tiny import VOCAB, attach, tiny_llama

SOME = torch.ones_like(PROMPTS)
OPTIONS = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "attention_mask": SOME}


def adapted(selector: BranchSelector | None = None, **config: Any) -> PeftModel:
    model = attach(
        tiny_llama(),
        method="branch_per_cluster",
        shared_rank=2,
        init_weights=False,
        task_type="CAUSAL_LM",
        **config,
    ).eval()
    model.peft_config["default"].branch_selector = selector or fitted()
    return model


@torch.no_grad()
def logits(model: nn.Module, x: Tensor = PROMPTS, **inputs: Any) -> Tensor:
    return model(input_ids=x, **inputs).logits


def states(model: nn.Module) -> list[BranchState]:
    return [m.state for m in model.modules() if isinstance(m, ManyLoraLayer)]


def test_it_is_saved_beside_the_weights_and_loaded_with_them(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "branch_selector.safetensors").is_file()
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name).eval()
        assert loaded.peft_config[name].branch_selector.names == NAMES
        assert torch.equal(logits(loaded), expected)
    second = attach(tiny_llama(), method="hydralora", task_type="CAUSAL_LM").eval()
    second.load_adapter(tmp_path, "clusters")
    second.set_adapter("clusters")
    assert torch.equal(logits(second), expected)


def test_an_adapter_that_lost_its_selector_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter" / "branch_selector.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"/adapter chooses its branch by a selector, but "
        r"branch_selector.safetensors is not beside its weights",
    ):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_the_automodel_path_cannot_carry_a_selector_and_says_so(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = attach(base, method="branch_per_cluster", task_type="CAUSAL_LM")
    model.peft_config["default"].branch_selector = fitted()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"load it with PeftModel.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_configuration_that_peft_read_has_no_selector_and_the_error_says_what_to_do(
    tmp_path: Path,
) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"leave out config=, or use ManyLoraConfig"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
    read = manylora.ManyLoraConfig.from_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=read)
    assert torch.equal(logits(loaded), logits(model))


def test_a_config_without_selector_saves_none(tmp_path: Path) -> None:
    attach(tiny_llama(), method="branch_per_cluster").save_pretrained(tmp_path)
    assert not (tmp_path / "branch_selector.safetensors").exists()
    assert PeftConfig.from_pretrained(tmp_path).selector is False


def test_forward_chooses_from_the_prompt_which_labels_mark() -> None:
    model = adapted()
    with manylora.branch_ids(model, IDS):
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(model(PROMPTS).logits, expected)
    assert all(state.ids is None for state in states(model))
    # The answer is twice as long as the prompt and written in another branch's tokens.
    answer = torch.tensor([prompt(*RANGES[(k + 1) % 3], 5, 26)[2:] for k in IDS.tolist()])
    x = torch.cat([PROMPTS, answer], 1)
    labels = torch.cat([torch.full_like(PROMPTS, -100), answer], 1)
    with manylora.branch_ids(model, IDS):
        expected = logits(model, x)
    assert torch.equal(logits(model, x, labels=labels), expected)
    padded = torch.cat([torch.full((4, 3), 30), x], 1)
    mask = (torch.arange(39) >= 3).expand(4, 39).long()
    marked = torch.cat([torch.full((4, 3), -100), labels], 1)
    out = logits(model, padded, labels=marked, attention_mask=mask)
    torch.testing.assert_close(out[:, 3:], expected, rtol=0, atol=1e-5)


def test_a_mask_given_by_place_marks_the_prompt_too() -> None:
    model = attach(tiny_llama(), method="branch_per_cluster", init_weights=False).eval()
    model.peft_config["default"].branch_selector = fitted()
    other = torch.tensor(prompt(*RANGES[1], 5, 26))[None]
    x = torch.cat([other, PROMPTS[:1]], 1)  # the first part is padding, written in other tokens
    mask = (torch.arange(x.shape[1]) >= other.shape[1]).long()[None]
    with torch.no_grad():
        assert torch.equal(model(x, mask).logits, model(input_ids=x, attention_mask=mask).logits)


def test_training_under_checkpointing_uses_the_selected_branches() -> None:
    def gradients(selected: bool) -> list[Tensor]:
        model = adapted().train()
        if selected:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = []
        for rows in (slice(0, 2), slice(2, 4)):  # two forwards before the first backward
            ids = contextlib.nullcontext() if selected else manylora.branch_ids(model, IDS[rows])
            with ids:
                losses.append(model(input_ids=PROMPTS[rows]).logits.logsumexp(-1).sum())
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
        {"generation_config": GenerationConfig(num_beams=3, max_new_tokens=5, pad_token_id=0)},
    ],
    ids=["greedy", "beams", "beams-return", "sample-return", "generation_config"],
)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_generate_chooses_from_the_prompt(search: dict[str, Any], task_type: str | None) -> None:
    model = attach(
        tiny_llama(), method="branch_per_cluster", init_weights=False, task_type=task_type
    ).eval()
    model.peft_config["default"].branch_selector = fitted()
    beams, kept = search.get("num_beams", 1), search.get("num_return_sequences", 1)
    options = {"do_sample": False, **OPTIONS, **search}
    if "generation_config" in search:
        beams = 3
        options = {"attention_mask": SOME, **search}
    with manylora.branch_ids(model, IDS.repeat_interleave(max(beams, kept))):
        expected = model.generate(input_ids=PROMPTS, **options)
    assert torch.equal(model.generate(input_ids=PROMPTS, **options), expected)
    assert torch.equal(model.generate(PROMPTS, **options), expected)
    assert len(expected) == kept * len(PROMPTS)
    assert all(state.ids is None and not state.selected for state in states(model))


def test_generate_reads_the_models_own_generation_config_too() -> None:
    model = adapted()
    with manylora.branch_ids(model, IDS.repeat_interleave(3)):
        expected = model.generate(input_ids=PROMPTS, num_beams=3, **OPTIONS)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(input_ids=PROMPTS, **OPTIONS), expected)
    with manylora.branch_ids(model, IDS):
        forward = logits(model)
    assert torch.equal(logits(model), forward)


def test_explicit_ids_win() -> None:
    model = adapted()
    with manylora.branch_ids(model, 1):
        explicit = logits(model)
        explicit_text = model.generate(input_ids=PROMPTS, **OPTIONS)
    model.peft_config["default"].branch_selector = None
    with manylora.branch_ids(model, 1):
        assert torch.equal(logits(model), explicit)
        assert torch.equal(model.generate(input_ids=PROMPTS, **OPTIONS), explicit_text)


def test_a_decoding_loop_of_ones_own_is_refused_without_ids() -> None:
    model = adapted()
    cache = model(input_ids=PROMPTS, use_cache=True).past_key_values
    hint = r"which this call does not have; wrap your decoding loop in `with manylora.branch_ids"
    with pytest.raises(ValueError, match=hint):
        model(input_ids=PROMPTS[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match=hint):
        model(inputs_embeds=torch.zeros(4, 3, 32))
    with manylora.branch_ids(model, IDS):
        assert model(input_ids=PROMPTS[:, -1:], past_key_values=cache).logits.shape == (4, 1, VOCAB)
    with model.disable_adapter():
        expected = tiny_llama().eval()(inputs_embeds=torch.zeros(4, 3, 32)).logits
        assert torch.equal(model(inputs_embeds=torch.zeros(4, 3, 32)).logits, expected)


def test_mixed_batches_ask_the_selector_of_each_rows_adapter() -> None:
    model = adapted()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(
            "turned",
            manylora.ManyLoraConfig(
                method="branch_per_cluster", init_weights=False, task_type="CAUSAL_LM"
            ),
        )
        model.add_adapter("hydra", manylora.ManyLoraConfig(init_weights=False))
    model.peft_config["turned"].branch_selector = fitted((2, 0, 1))
    rows = ["turned", "default", "__base__", "hydra"]
    mixed = logits(model.eval(), adapter_names=rows)
    for i, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, PROMPTS[i : i + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, PROMPTS[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=2e-6)
    model.base_model.set_adapter(["default", "turned"])
    with pytest.raises(ValueError, match="default, turned each choose their own branch"):
        logits(model)
