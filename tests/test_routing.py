"""What a meter counts while a run is scored, and what it leaves in routing.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from manylora.adapter.layer import layers_of
from manylora.adapter.router import router_weights
from manylora.evaluate.held_out import evaluate_run
from manylora.inspect.recorder import MOST_LAYERS, TokenRecorder
from manylora.inspect.routing import Routing, RoutingMeter, read_routing, write_routing
from manylora.recipe import Recipe
from manylora.train import train
from routers import EVEN, SPLIT, TASKS, measured, one_hot, routed
from tiny import attach, tiny_llama


def test_means_and_entropies_are_those_of_the_routers_own_weights() -> None:
    model = attach(tiny_llama(), method="hydralora", init_weights=False).eval()
    layer, seen = layers_of(model)[3], []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    meter, ids = RoutingMeter(model, ["a", "b"]), torch.randint(4, 60, (3, 7))
    mask = torch.ones(3, 7)
    mask[0, :4] = 0
    with torch.no_grad(), meter.watching(mask, torch.tensor([0, 1, 1])):
        model(input_ids=ids, attention_mask=mask)
    routing = meter.result()
    assert routing is not None
    weights = router_weights(seen[0], layer.tensors("default")["router"]).detach().double()
    place = routing["layers"].index(layer.name)
    own = {"a": weights[0, 4:], "b": weights[1:].flatten(0, 1)}
    assert routing["tokens"] == {"a": 3, "b": 14}
    for task, expected in own.items():
        entropy = -(expected * expected.log()).sum(-1).mean()
        assert routing["tasks"][task][place] == pytest.approx(expected.mean(0).tolist(), abs=1e-6)
        assert routing["entropies"][task][place] == pytest.approx(float(entropy), abs=1e-6)
        assert 0 < float(entropy) < math.log(3) - 1e-4


def test_padding_is_not_counted() -> None:
    model, tasks = routed(SPLIT), torch.tensor([0, 1])
    x = one_hot(tasks).clone()
    x[:, :2] = 0  # all branches alike, if it were counted
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    routing = measured(model, x, tasks, mask)
    assert routing["tasks"]["law"] == [pytest.approx([1, 0, 0], abs=1e-6)]
    assert routing["entropies"]["law"] == pytest.approx([0], abs=1e-6)
    assert routing["tokens"] == {"law": 2, "medicine": 2}


def test_a_router_that_reads_what_A_makes_is_measured_on_that() -> None:
    model = routed([[0.0, 0.0], [math.log(3), 0.0]], router_input="Ax", num_branches=2)
    A = model.get_parameter("base_model.model.linear.manylora_A.default.weight")
    with torch.no_grad():
        A.copy_(torch.eye(2))
    routing = measured(model, torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]))
    assert routing["tasks"]["law"] == [pytest.approx([0.25, 0.75], abs=1e-6)]


def test_watching_changes_nothing_that_the_model_says() -> None:
    model, x = routed(SPLIT), one_hot(torch.tensor([0, 1]))
    meter = RoutingMeter(model, TASKS)
    with meter.watching(torch.ones(2, 4), torch.tensor([0, 1])):
        watched = model(x)
    assert torch.equal(watched, model(x))
    assert meter.counts.tolist() == [4, 4, 0]  # and the second call was not counted


def test_a_model_without_a_router_has_no_routing() -> None:
    model = attach(tiny_llama(), method="multilora").eval()
    meter = RoutingMeter(model, ["a"])
    with meter.watching(torch.ones(1, 3), torch.tensor([0]), torch.ones(1, 3), [0]):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert meter.result() is None


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    routing = measured(routed(EVEN), one_hot(torch.tensor([0])), torch.tensor([0]))
    write_routing(tmp_path, routing)
    assert read_routing(tmp_path) == routing
    old = Routing(branches=2, layers=["x"], tasks={"a": [[0.5, 0.5]]})
    write_routing(tmp_path, old)
    assert read_routing(tmp_path) == old


def test_scoring_a_run_leaves_everything_and_scoring_it_again_the_same(
    make_recipe: Callable[..., Recipe],
) -> None:
    run = train(make_recipe(method="hydralora", num_branches=2))
    first = (run / "routing.json").read_text()
    routing = read_routing(run)
    tasks = ["colour", "copy", "parity"]
    assert list(routing["tasks"]) == list(routing["entropies"]) == list(routing["tokens"]) == tasks
    assert list(routing["examples"]["tasks"]) == tasks
    for task in tasks:
        assert len(routing["entropies"][task]) == len(routing["layers"])
        assert all(0 < entropy <= math.log(2) + 1e-6 for entropy in routing["entropies"][task])
    evaluate_run(run, Console(stderr=True))
    assert (run / "routing.json").read_text() == first


@pytest.mark.parametrize("branches", [3, 8])
def test_the_file_of_a_7B_model_with_26_tasks_stays_under_a_megabyte(
    branches: int, tmp_path: Path
) -> None:
    layers = [f"model.layers.{i}.mlp.{m}_proj" for i in range(32) for m in "qkvogud"]
    names = [f"task_{i:02}" for i in range(26)]
    recorder = TokenRecorder(layers, branches, len(names))
    torch.manual_seed(0)
    for task in range(len(names)):
        for example in range(2):
            for length in (300, 200):  # a prompt and an answer, both longer than what is kept
                ids = torch.full((1, length), 7)
                recorder.begin(torch.ones(1, length), torch.tensor([task]), ids, [example])
                for layer in layers:
                    recorder.add(layer, torch.rand(length, branches).softmax(-1))
    meter = RoutingMeter(routed([[0.0] * 3] * branches), names)
    meter.recorder, meter.counts = recorder, torch.full((len(names),), 1000.0).double()
    for layer in layers:
        weights = torch.rand(len(names), branches).softmax(-1).double()
        meter.sums[layer] = 1000 * torch.cat([weights, torch.rand(len(names), 1)], -1)
    routing = meter.result(_Words())  # type: ignore[arg-type]
    assert routing is not None and len(routing["layers"]) == 224
    write_routing(tmp_path, routing)
    shown = routing["examples"]["tasks"]["task_25"]
    assert len(shown) == 2 and len(shown[0]["text"]) == 60 and shown[0]["start"] == 260
    assert 0 < len(routing["examples"]["layers"]) <= MOST_LAYERS
    size = (tmp_path / "routing.json").stat().st_size
    assert 200_000 < size < 1_000_000
    assert json.loads((tmp_path / "routing.json").read_text())["branches"] == branches


class _Words:
    """A tokenizer whose every token is a word of ten letters."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], **options: bool) -> str:
        return "abcdefghi " * len(ids)
