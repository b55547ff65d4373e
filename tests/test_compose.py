"""LoraHub from end to end: tasks with a known answer, and what is left in the folder."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from loras import TOKENS, delta, logits, save_lora, train_lora
from manylora.base import load_model, load_tokenizer
from manylora.compose import ComposeError, compose
from manylora.composing.few_shot import few_shot
from manylora.composing.folder import print_weights
from manylora.composing.search import TRIALS_PER_WEIGHT, Trial, best_of, search
from manylora.composing.updates import AdapterError
from manylora.corpus import Encoder, Fields
from manylora.plain_peft import plain_logits
from tiny import save_tiny_model, write_tasks

QUIET = Console(quiet=True)
TASKS = ("copy", "colour", "parity")
LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, tasks/, and a plain LoRA that was trained on each task."""
    place = tmp_path_factory.mktemp("place")
    # Larger weights than a new model has: with those its answers can hardly be moved.
    save_tiny_model(place / "model", initializer_range=0.2)
    write_tasks(place / "tasks", rows=40)
    for task in TASKS:
        train_lora(place / "model", place / "tasks" / f"{task}.jsonl", place / task)
    return place


def composed(place: Path, output: Path, task: str = "colour", **options: Any) -> dict[str, Any]:
    """compose.json of the three adapters on a task."""
    adapters = [place / name for name in TASKS]
    rows = str(place / "tasks" / f"{task}.jsonl")
    compose(adapters, rows, output=output, **{"console": QUIET, **options})
    return json.loads((output / "compose.json").read_text())


@pytest.mark.parametrize("way", ["products", "factors"])
@pytest.mark.parametrize("task", ["colour", "parity"])
def test_the_task_of_one_adapter_gets_that_adapter(
    place: Path, tmp_path: Path, way: str, task: str
) -> None:
    record = composed(place, tmp_path / "out", task, way=way)
    weights = [adapter["weight"] for adapter in record["adapters"]]
    # "factors" gives the same for w and -w.
    expected = [float(name == task) for name in TASKS]
    assert [abs(weight) for weight in weights] == pytest.approx(expected, abs=0.15)
    assert [Path(adapter["path"]).name for adapter in record["adapters"]] == list(TASKS)
    (scores,) = json.loads((tmp_path / "out" / "scores.json").read_text())["tasks"].values()
    assert scores["after"]["nll"][2] < scores["before"]["nll"][1] - 1.0  # the intervals
    assert record["best"]["nll"] < record["trials"][0]["nll"] - 1.0


def test_the_folder_holds_the_composed_model_and_loads_without_manylora(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record = composed(place, out, "parity", budget=6)
    weights = [adapter["weight"] for adapter in record["adapters"]]
    assert any(weights)
    deltas = [delta(place / "model", place / task, LAYER) for task in TASKS]
    expected = sum(w * d for w, d in zip(weights, deltas, strict=True))
    assert torch.allclose(delta(place / "model", out, LAYER), expected, rtol=0, atol=1e-6)
    # The process asserts that manylora was not imported.
    (plain,) = plain_logits(str(place / "model"), [out], TOKENS)
    assert torch.allclose(plain, logits(place / "model", out), rtol=0, atol=1e-5)
    assert (plain - logits(place / "model")).abs().max() > 1e-2
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and LAYER in targets
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "compose.json"),
        *("scores.json", "README.md"),
    }
    card = (out / "README.md").read_text()
    assert f"{place.name}/parity | {weights[2]:+.4f} |" in card
    console = Console(record=True, width=200, file=io.StringIO())
    print_weights(out, console)
    assert f"{weights[2]:+.3f}  {place.resolve() / 'parity'}" in console.export_text()


def test_it_loads_where_manylora_cannot_be_imported(place: Path, tmp_path: Path) -> None:
    composed(place, tmp_path / "out", budget=2)
    program = (
        "import sys; sys.modules['manylora'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model.peft_config['default'].peft_type.value)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LORA")


def test_the_losses_are_those_of_the_weights_on_the_examples(place: Path, tmp_path: Path) -> None:
    """The best trial's NLL, once more by a forward pass over each example of the saved model."""
    record = composed(place, tmp_path / "out", budget=5, examples=4)
    model = PeftModel.from_pretrained(load_model(str(place / "model")), tmp_path / "out").eval()
    encoder = Encoder(load_tokenizer(str(place / "model")), 512)
    data = few_shot(str(place / "tasks" / "colour.jsonl"), Fields(), 4, 0, encoder, QUIET)
    assert [shot.source for shot in data.shots] == record["examples"]
    losses = []
    for shot in data.shots:
        ids = torch.tensor([shot.input_ids])
        labels = ids.clone()
        labels[:, : shot.prompt_length] = -100
        losses.append(float(model(input_ids=ids, labels=labels).loss))
    assert record["best"]["nll"] == pytest.approx(sum(losses) / 4, abs=1e-4)
    for trial in record["trials"]:
        penalty = 0.05 * sum(map(abs, trial["weights"])) / 3
        assert trial["loss"] == pytest.approx(trial["nll"] + penalty)
    assert record["best"]["loss"] == min(trial["loss"] for trial in record["trials"])
    assert len(record["trials"]) == 1 + 5 and record["trials"][0]["weights"] == [0.0] * 3


def test_the_same_seed_gives_the_same_folder_and_another_other_examples(
    place: Path, tmp_path: Path
) -> None:
    first = composed(place, tmp_path / "a", budget=8, seed=3)
    torch.manual_seed(5)  # nothing may depend on random numbers of others
    again = composed(place, tmp_path / "b", budget=8, seed=3)
    assert first == again
    for name in ("scores.json", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    file = "adapter_model.safetensors"
    one, two = (load_file(str(tmp_path / folder / file)) for folder in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    other = composed(place, tmp_path / "c", budget=8, seed=4)
    assert other["examples"] != first["examples"] and other["trials"] != first["trials"]


def test_adapters_that_do_not_help_are_not_used(tiny_folder: Path, tmp_path: Path) -> None:
    """Noise makes the base model worse: weights of 0, and the base model's logits."""
    noise = [save_lora(tiny_folder, tmp_path / str(i), i, lora_alpha=4000) for i in range(2)]
    rows = str(write_tasks(tmp_path / "tasks") / "copy.jsonl")
    console = Console(record=True, width=200, file=io.StringIO())
    out = compose(noise, rows, budget=3, output=tmp_path / "out", console=console)
    assert json.loads((out / "compose.json").read_text())["best"]["weights"] == [0.0, 0.0]
    assert "changes nothing" in console.export_text()
    assert torch.equal(logits(tiny_folder, out), logits(tiny_folder))


def test_one_adapter_is_enough(place: Path, tmp_path: Path) -> None:
    out = compose(
        [place / "copy"],
        str(place / "tasks" / "copy.jsonl"),
        way="factors",
        budget=15,
        output=tmp_path / "out",
        console=QUIET,
    )
    (weight,) = json.loads((out / "compose.json").read_text())["best"]["weights"]
    assert abs(weight) > 0.5


def test_what_cannot_be_composed_is_said_and_nothing_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refused(message: str, adapters: list[Path], **options: Any) -> None:
        given = {"rows": str(place / "tasks" / "copy.jsonl"), "output": out, "console": QUIET}
        with pytest.raises((ComposeError, AdapterError), match=message):
            compose(adapters, **given | options)
        assert not out.exists()

    two = [place / "copy", place / "parity"]
    refused("no adapter", [])
    refused("more than once", [*two, place / "tasks" / ".." / "copy"])
    refused("budget=0", two, budget=0)
    refused("budget=101 .* at most 100", two, budget=101)
    refused("examples=0", two, examples=0)
    refused("way='sum'", two, way="sum")
    refused("no such folder", [*two, place / "none"])
    rank2 = save_lora(place / "model", tmp_path / "rank2", r=2)
    refused("needs equal ranks", [*two, rank2], way="factors")
    other = save_tiny_model(tmp_path / "other")
    refused("different base models", [*two, save_lora(other, tmp_path / "a")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'manylora\[compose\]'", two)


def test_a_used_output_folder_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ComposeError, match="not an empty folder"):
        composed(place, tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


def test_search_finds_the_least_loss_within_its_bounds() -> None:
    target = [1.0, -0.5, 0.3]

    def nll(weights: Sequence[float]) -> float:
        return sum((w - t) ** 2 for w, t in zip(weights, target, strict=True))

    trials = search(nll, 3, 40, seed=0)
    assert len(trials) == 41 and trials[0].weights == [0.0, 0.0, 0.0]
    assert best_of(trials).weights == pytest.approx(target, abs=0.05)
    outwards = search(lambda weights: -sum(weights), 2, 40, seed=0)
    assert all(abs(weight) <= 1.5 for trial in outwards for weight in trial.weights)
    assert best_of(outwards).weights == pytest.approx([1.5, 1.5], abs=0.1)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_budget_is_what_is_tried_besides_no_weights(budget: int) -> None:
    trials = search(lambda weights: sum((w - 1) ** 2 for w in weights), 2, budget, 0)
    assert trials[0].weights == [0.0, 0.0] and len(trials) == 1 + budget


def test_the_largest_budget_is_one_that_the_search_can_do() -> None:
    for count in (1, 2, 3, 6):
        budget = TRIALS_PER_WEIGHT * count
        trials = search(lambda weights: sum(w * w for w in weights), count, budget, 0)
        assert len(trials) == 1 + budget


def test_an_error_in_a_trial_leaves_no_thread_that_keeps_the_process_from_ending() -> None:
    before = threading.active_count()
    kept = []
    for last in (1, 2, 5):
        losses = iter([1.0] * last)
        try:
            search(lambda weights, losses=losses: next(losses), 3, 20, 0)  # type: ignore[misc]
        except StopIteration as error:
            kept.append(error)
    assert len(kept) == 3
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_losses_that_are_not_finite_are_never_the_best() -> None:
    def nll(weights: Sequence[float]) -> float:
        return math.nan if weights[0] > 0.3 else math.inf if weights[0] < 0 else 1 - weights[0]

    best = best_of(search(nll, 1, 20, seed=0))
    assert 0.0 <= best.weights[0] <= 0.3 and math.isfinite(best.loss)
    lost, found = Trial([1.0], math.nan, math.nan), Trial([0.0], 2.0, 2.0)
    assert best_of([lost, found]) is best_of([found, lost]) is found
    assert lost.plain() == {"weights": [1.0], "nll": None, "loss": None}
