"""Plain LoRA folders for the tests of composing, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from manylora.base import load_model, load_tokenizer
from manylora.corpus import Collator, CorpusError, Encoder, read_examples

TOKENS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(1))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def save_lora(model: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter with random A and B on some layers of a model folder."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    fields |= {"init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(load_model(str(model)), LoraConfig(**fields)).save_pretrained(folder)
    return folder


def train_lora(model: Path, rows: Path, folder: Path, steps: int = 80) -> Path:
    """An adapter that was trained on all rows of a file at once."""
    encoder = Encoder(load_tokenizer(str(model)), 512)
    found = [row for row in read_examples(rows) if not isinstance(row, CorpusError)]
    encoded = encoder.encode_many(found)
    batch = Collator(0)(
        [
            {"input_ids": e.input_ids, "learned": e.learned, "task_id": 0, "source": e.source}
            for e in encoded
            if not isinstance(e, CorpusError)
        ]
    )
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = get_peft_model(load_model(str(model)), config)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            loss = tuned(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tuned.save_pretrained(folder)
    return folder


def delta(model: Path, folder: Path, layer: str) -> Tensor:
    """The update of a layer as PEFT itself computes it."""
    loaded = PeftModel.from_pretrained(load_model(str(model)), folder)
    return loaded.get_base_model().get_submodule(layer).get_delta_weight("default").detach()


@torch.inference_mode()
def logits(model: Path, folder: Path | None = None) -> Tensor:
    """Of TOKENS, by a model folder with an adapter or without."""
    loaded = load_model(str(model))
    if folder is None:
        return loaded(input_ids=TOKENS).logits
    return PeftModel.from_pretrained(loaded, folder).eval()(input_ids=TOKENS).logits
