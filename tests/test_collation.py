"""Batches: padded or packed, the same examples, the same loss, and none sees another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from manylora.base import load_tokenizer
from manylora.corpus import IGNORED, Collator, Encoder, Row, dataset_of, load_corpus
from manylora.corpus.batches import first_fit
from manylora.recipe import Recipe, parse_recipe
from manylora.train import train
from manylora.training.packing import PackingError, check_packing
from tiny import tiny_llama

PAD = 0


def row(tokens: int, learned: list[tuple[int, int]] | None = None, task: int = 0) -> Row:
    ids = list(range(10 * tokens, 11 * tokens))
    spans = learned or [(tokens // 2, tokens)]
    return {"input_ids": ids, "learned": spans, "task_id": task, "source": f"t.jsonl:{tokens}"}


def test_a_padded_batch_starts_together_and_learns_only_what_is_to_be_learned() -> None:
    rows = [row(6, [(1, 2), (4, 6)], task=1), row(4)]
    batch = Collator(PAD)(rows)
    assert batch["task_ids"].tolist() == [1, 0]
    assert batch["sources"] == ["t.jsonl:6", "t.jsonl:4"]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, 61, IGNORED, IGNORED, 64, 65],
        [IGNORED, IGNORED, 42, 43, IGNORED, IGNORED],
    ]


def test_a_packed_batch_keeps_task_and_position_of_every_token() -> None:
    batch = Collator(PAD, packing=True)([row(3, task=2), row(8, task=1), row(4, task=3)])
    assert "attention_mask" not in batch  # a 2-D mask would join what positions keep apart
    assert batch["input_ids"].shape == (2, 8)
    assert batch["task_ids"].tolist() == [[1] * 8, [3, 3, 3, 3, 2, 2, 2, 0]]
    assert batch["position_ids"].tolist() == [list(range(8)), [0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch["token_mask"].tolist() == [[1] * 8, [1] * 7 + [0]]
    assert batch["cu_seq_lens"].tolist() == [0, 8, 12, 15, 16]  # padding by itself
    assert batch["sources"] == ["t.jsonl:8", "t.jsonl:4", "t.jsonl:3"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_packing_holds_every_example_once_within_the_room(lengths: list[int]) -> None:
    groups = first_fit(lengths, max(lengths))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= max(lengths) for group in groups)
    # First fit: two rows that are both at most half full would have been one.
    assert sum(sum(lengths[i] for i in g) * 2 <= max(lengths) for g in groups) <= 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_do_not_see_each_other(attention: str) -> None:
    model = tiny_llama(attn_implementation=attention).double()
    rows = [row(3), row(5), row(8), row(4)]
    for item in rows:
        item["input_ids"] = [token % 60 + 3 for token in item["input_ids"]]
    batch = Collator(PAD, packing=True)(rows)
    with torch.inference_mode():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    where = {source: i for i, source in enumerate(batch["sources"])}
    found = packed[batch["token_mask"].bool()]
    starts = [0]
    for source in batch["sources"]:
        starts.append(starts[-1] + int(source.rpartition(":")[2]))
    for item in rows:
        place = where[item["source"]]
        with torch.inference_mode():
            alone = model(torch.tensor([item["input_ids"]])).logits[0]
        assert torch.allclose(found[starts[place] : starts[place + 1]], alone, atol=1e-9)


def test_a_model_that_joins_packed_examples_is_refused() -> None:
    model = tiny_llama()
    check_packing(model)
    forward = model.forward

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "position_ids": None})

    model.forward = without_positions  # type: ignore[method-assign]
    with pytest.raises(PackingError, match="packing=false"):
        check_packing(model)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "hydralora", "balance_loss": "switch"},
        {"method": "branch_per_cluster", "shared_rank": 2},
        {"method": "lora_moe", "gate": "task"},
    ],
    ids=lambda adapter: adapter["method"],
)
def test_packing_changes_nothing_but_the_padding(
    make_recipe: Callable[..., Recipe], adapter: dict[str, Any]
) -> None:
    plain = make_recipe("plain", **adapter)
    packed = parse_recipe({**make_recipe("packed", **adapter).model_dump(), "packing": True})
    runs = [train(recipe) for recipe in (plain, packed)]
    first, second = (load_file(str(run / "adapter_model.safetensors")) for run in runs)
    # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
    assert all(torch.allclose(first[key], second[key], atol=2e-3) for key in first)
    told = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    for one, other in zip(*told, strict=True):
        assert one["tokens"] == other["tokens"]
        for task, said in one["tasks"].items():
            assert other["tasks"][task]["tokens"] == said["tokens"]
            assert other["tasks"][task]["loss"] == pytest.approx(said["loss"], rel=1e-3)


def test_a_worker_beside_the_training_changes_nothing(make_recipe: Callable[..., Recipe]) -> None:
    recipes = [make_recipe(name, lora_dropout=0.2) for name in ("within", "beside")]
    recipes[1].train.workers = 2
    first, second = (load_file(str(train(r) / "adapter_model.safetensors")) for r in recipes)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_rows_are_encoded_when_they_are_asked_for(tiny_folder: Path, task_folder: Path) -> None:
    corpus = load_corpus(task_folder)
    encoder = Encoder(load_tokenizer(str(tiny_folder)), 200)
    train_rows = {task: corpus.train[task] for task in corpus.tasks}
    data = dataset_of(train_rows, corpus.tasks, encoder)
    assert len(data) == sum(map(len, train_rows.values()))
    first = len(train_rows["colour"])
    for place, task, number in ((0, 0, 0), (first, 1, 0), (first + 3, 1, 3), (-1, 2, -1)):
        example = train_rows[corpus.tasks[task]][number]
        encoded = encoder.encode(example)
        assert data[place] == {
            "input_ids": encoded.input_ids,
            "learned": encoded.learned,
            "task_id": task,
            "source": example.source,
        }
