"""What the batch of a server keeps of its rows, for models that do not keep everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

import manylora
from manylora.serve.batch import Batch, Row, check_batching

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,  # else attention hardly changes what is likeliest
}


def _lora() -> manylora.ManyLoraConfig:
    return manylora.ManyLoraConfig(task_type="CAUSAL_LM", init_weights=False)


def test_a_window_of_attention_is_kept() -> None:
    """Rows are padded on the left, and a window is counted in a row's own tokens."""
    config = MistralConfig(**_SMALL, sliding_window=5, num_key_value_heads=2)
    torch.manual_seed(0)
    model = get_peft_model(MistralForCausalLM(config), _lora()).eval()
    prompts = [list(range(3, 14)), [5, 6]]
    batch = Batch(model, pad=0)
    with torch.inference_mode():
        tokens = batch.read([Row("default", -1)] * 2, prompts).argmax(-1)
        written = [tokens]
        for _ in range(9):
            written.append(batch.step(written[-1]).argmax(-1))
        for i, prompt in enumerate(prompts):
            out = model.generate(
                input_ids=torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=10,
                eos_token_id=99,
            )
            assert torch.stack(written, 1)[i].tolist() == out[0, len(prompt) :].tolist()


def test_a_model_that_keeps_a_state_is_refused() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    lora = manylora.ManyLoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"])
    model = get_peft_model(MambaForCausalLM(config), lora).eval()
    with pytest.raises(ValueError, match=r"MambaForCausalLM .* served in batches"):
        check_batching(model, ["default", "__base__"], pad=0)


def test_a_row_with_a_branch_that_its_adapter_does_not_have_is_refused() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**_SMALL, num_key_value_heads=2)
    model = get_peft_model(MistralForCausalLM(config), _lora(), adapter_name="routed")
    clusters = manylora.ManyLoraConfig(method="branch_per_cluster", task_type="CAUSAL_LM")
    model.add_adapter("clusters", clusters)
    for active in ("routed", "clusters"):  # one adapter for all rows goes another way
        model.set_adapter(active)
        for rows in ([Row("clusters", 3)], [Row("clusters", 0), Row("clusters", -2)]):
            batch = Batch(model.eval(), pad=0)
            with pytest.raises(ValueError, match=r"ids must be in -1\.\.2 .* adapter 'clusters'"):
                batch.read(rows, [[5, 6]] * len(rows))
            assert not batch.rows
