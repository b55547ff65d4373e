"""Documents as a base model reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.discovery.discover import Documents, discover
from manylora.discovery.embeddings import TOKENS, HiddenStates, ModelEmbedding, embeddings
from manylora.discovery.options import DiscoveryOptions
from tiny import save_tiny_model

TEXTS = ["a harbour", "b", "find the files\nin a folder", "ünïcode", "x" * 90, "zz"]


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


def test_states_are_the_mean_over_all_tokens_but_the_first(deep_folder: Path) -> None:
    states = HiddenStates(str(deep_folder))
    found = states(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(deep_folder)
    model = AutoModelForCausalLM.from_pretrained(deep_folder)
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            hidden = model.model(ids, output_hidden_states=True).hidden_states[2]
            hidden = model.model.norm(hidden)[0]
        expected = hidden[1 if len(hidden) > 1 else 0 :].mean(0)
        np.testing.assert_allclose(row, expected.numpy(), atol=2e-5)
    assert states.layer == 2


def test_batch_mates_change_nothing(deep_folder: Path) -> None:
    states = HiddenStates(str(deep_folder))
    alone = np.concatenate([states([text]) for text in TEXTS])
    np.testing.assert_allclose(states(TEXTS), alone, atol=2e-5)
    np.testing.assert_allclose(states(TEXTS[::-1])[::-1], alone, atol=2e-5)


def test_of_a_long_document_the_head_is_read(deep_folder: Path) -> None:
    states = HiddenStates(str(deep_folder))
    head = "y" * TOKENS
    assert np.array_equal(states([head + "tail"]), states([head]))
    assert not np.array_equal(states([head[1:] + "t"]), states([head]))


def test_an_empty_document_is_zeros_and_none_are_none(deep_folder: Path) -> None:
    states = HiddenStates(str(deep_folder))
    assert not states(["", "a", ""])[[0, 2]].any()
    assert states(["", "a"])[1].any()
    assert states([]).shape == (0, 32)


def test_rows_are_unit_and_those_of_the_sample_again(deep_folder: Path) -> None:
    embedding = ModelEmbedding(HiddenStates(str(deep_folder)))
    rows = embedding.fit(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedding.rows(TEXTS), rows, atol=1e-4)
    assert "after layer 2" in embedding.about["features"]


def test_one_document_can_be_fitted(deep_folder: Path) -> None:
    assert np.isfinite(ModelEmbedding(HiddenStates(str(deep_folder))).fit(["a text"])).all()


def test_two_kinds_of_documents_are_found_and_progress_is_told(deep_folder: Path) -> None:
    texts = [f"{'aeiou' * (3 + i % 4)} {i}" for i in range(40)]
    texts += [f"{'#$%&!' * (3 + i % 4)} {i}" for i in range(40)]
    options = DiscoveryOptions(features="model", clusters=2, sample=60)
    said: list[str] = []
    make = embeddings(options, str(deep_folder), 0, said.append)
    documents = Documents(texts, ["data"] * 80, [str(i) for i in range(80)])
    done = discover(documents, options, 0, make)
    assert adjusted_rand_score([0] * 40 + [1] * 40, done.labels) == 1
    assert said[0].startswith("loading")
    assert sum(text.startswith("loading") for text in said) == 1
    assert any("documents read by" in text for text in said)


def test_the_model_learns_from_fewer_documents() -> None:
    assert DiscoveryOptions().learned_from == 20_000
    assert DiscoveryOptions(features="model").learned_from == 2_000
    assert DiscoveryOptions(features="model", sample=50).learned_from == 50
