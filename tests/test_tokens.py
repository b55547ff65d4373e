"""Held-out examples token by token: whose weights stand beside which text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manylora.adapter.layer import layers_of
from manylora.adapter.router import router_weights
from manylora.base import load_tokenizer
from manylora.corpus import Encoder
from manylora.evaluate.answers import Question, score_answers
from manylora.evaluate.scores import held_out
from manylora.inspect.recorder import MOST_LAYERS, TokenRecorder, pieces, shortest
from manylora.inspect.routing import RoutingMeter
from manylora.inspect.tokens import kept_layers, tokens
from manylora.recipe import Recipe
from manylora.run import recipe_of
from manylora.train import train
from routers import EVEN, built, routed, save
from tiny import attach, tiny_llama

Make = Callable[..., Recipe]
COLUMNS = ("run", "task", "example", "position", "text", "branch", "weight")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def test_each_token_has_the_weights_that_its_own_layer_inputs_give(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Among batch mates, padding and wrong answers, as if the right answer were read alone."""
    model = attach(tiny_llama(vocab_size=300), method="hydralora", init_weights=False).eval()
    prompt, answers = [70, 71, 72], [[80, 81], [90, 91, 92, 93], [85]]
    shown = Question(prompt, answers, 1, 0, shown=0)
    other = Question([60, 61, 62, 63, 64], answers, 0, 1)
    meter = RoutingMeter(model, ["a", "b"])
    score_answers(model, [other, shown], 0, meter=meter)
    routing = meter.result(tokenizer)
    assert routing is not None and list(routing["examples"]["tasks"]) == ["a"]
    (example,) = routing["examples"]["tasks"]["a"]

    layers, seen = layers_of(model), {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer.name: args[0]}))
    read = [*prompt, *answers[1][:-1]]  # the last token is written and never read
    with torch.no_grad():
        model(input_ids=torch.tensor([read]))
        own = {
            layer.name: router_weights(seen[layer.name][0], layer.tensors("default")["router"])
            for layer in layers
        }
    assert example["start"] == 0
    assert "".join(example["text"]) == tokenizer.decode(read)
    mean = torch.stack(list(own.values())).mean(0)
    assert torch.tensor(example["weights"]) == pytest.approx(mean.numpy(), abs=6e-4)
    for name, found in zip(routing["examples"]["layers"], example["by_layer"], strict=True):
        assert torch.tensor(found) == pytest.approx(own[name].numpy(), abs=6e-3)


def test_long_examples_keep_the_end_of_the_prompt_and_the_beginning_of_the_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    recorder = TokenRecorder(["x"], 2, 1)
    for ids in (torch.arange(100, 150), torch.arange(200, 230)):
        recorder.begin(torch.ones(1, len(ids)), torch.tensor([0]), ids[None], [0])
        recorder.add("x", torch.stack([ids / 1000, 1 - ids / 1000], -1))
    (shown,) = recorder.examples(["a"], tokenizer)["tasks"]["a"]
    assert shown["start"] == 10
    first = [weights[0] for weights in shown["weights"]]
    assert first == [round(i / 1000, 3) for i in (*range(110, 150), *range(200, 220))]


def test_a_character_of_several_tokens_stands_at_its_last_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer.encode("a€b<|end|>c", add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert found == ["a", "", "", "€", "b", "<|end|>", "c"]
    assert pieces(tokenizer, ids[:2])[1] != ""  # what is cut off in a character is shown


def test_the_shortest_rows_are_shown() -> None:
    assert shortest([5, 3, 9, 3]) == [1, 3]
    assert shortest([5]) == [0]


def test_a_trained_run_shows_held_out_examples_of_every_task(make_recipe: Make) -> None:
    run = train(make_recipe(method="hydralora", num_branches=2))
    found = tokens(run)
    assert tuple(found.columns) == COLUMNS
    assert set(found["task"]) == {"colour", "copy", "parity"}
    assert set(found["example"]) == {0, 1} and set(found["branch"]) == {0, 1}
    sums = found.groupby(["task", "example", "position"])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1, abs=2e-3)
    recipe, tokenizer = recipe_of(run), load_tokenizer(recipe_of(run).model)
    held, _ = held_out(recipe.load_corpus(), Encoder(tokenizer, recipe.max_length), 6)
    for task in held:
        short = min(task.encoded, key=lambda item: len(item.input_ids))
        answer = short.input_ids[short.prompt_length : -1]
        expected = short.input_ids[: short.prompt_length][-40:] + answer[:20]
        own = found[(found["task"] == task.name) & (found["example"] == 0) & (found["branch"] == 0)]
        assert "".join(own["text"]) == tokenizer.decode(expected)
        assert own["position"].tolist()[-1] == short.prompt_length + len(answer[:20]) - 1


def test_layers_that_are_kept_can_be_seen_by_themselves(make_recipe: Make) -> None:
    run = train(make_recipe(method="hydralora", num_branches=2))
    layers = kept_layers(run)
    assert len(layers) == MOST_LAYERS and len(set(layers)) == MOST_LAYERS
    frames = [tokens(run, layer)["weight"].to_numpy() for layer in layers]
    assert any((frame != frames[0]).any() for frame in frames[1:])
    with pytest.raises(ValueError, match="keeps no tokens of layer 'nose' by itself; it does of"):
        tokens(run, "nose")


def test_a_method_without_a_token_router_has_none(tmp_path: Path) -> None:
    run = save(tmp_path / "run", attach(tiny_llama(), method="multilora"))
    assert tokens(run).empty and tuple(tokens(run).columns) == COLUMNS
    assert kept_layers(run) == []


def test_files_without_examples_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"older version.*manylora eval"):
        tokens(built(tmp_path / "old", EVEN))
    with pytest.raises(FileNotFoundError, match=r"routing.json.*manylora eval"):
        tokens(save(tmp_path / "never", routed(EVEN)))
    assert "examples" not in json.loads((tmp_path / "old" / "routing.json").read_text())
