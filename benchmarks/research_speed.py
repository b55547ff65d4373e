"""How long a step and an answer take beside LoRA's, for the methods of docs/research.md.

    python benchmarks/research_speed.py MULTITASK [--steps 15] [--rounds 4] [--mode eager compiled]
    python benchmarks/research_speed.py --show

Alone on one GPU. Data, clusters, the selector's choices and the budget are those of the part
3-clusters-as_is; the trainer is the comparison's. Each method has a process of its own, which keeps
its model and its compiled graphs, and the methods take turns; all of them warm up side by side,
untimed. A turn trains on the same first packed batches in every round. A step is timed from the
beginning of its forward pass to that of the next one, with the optimizer and any wait for the next
batch, whose branches are chosen while the device trains. Decoding is transformers' greedy
`generate` with the adapter as it is, from reading the prompts and choosing their branches to the
last token. A method without branches runs without the selector.

Writes benchmarks/results/research_speed.json: every step and every answer, and of what and where.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from here import about_here
from research import recipe_of, write_data
from research_parts import FALLBACK, PARTS, SHARED
from rich.console import Console
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from manylora.adapter.ids import branch_ids
from manylora.base import load_model
from manylora.comparison.cell import _model, _train
from manylora.comparison.contenders import Contender, contenders
from manylora.comparison.ground import Ground, prepare_ground
from manylora.comparison.site import needs_ids
from manylora.evaluate.answers import left_padded
from manylora.recipe import Choice, Recipe
from manylora.training.validation import eval_mode

RESULT = Path(__file__).parent / "results" / "research_speed.json"
PART = "3-clusters-as_is"
METHODS = ("lora", SHARED, FALLBACK[1], "hydralora")
MODES = ("eager", "compiled")
PROMPTS = (1, 16)  # at once
UNTIMED = 4  # steps at the beginning of a turn
Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """steps: timed, of a turn. tokens: that an answer is made to have."""

    recipe: Recipe
    choice: Choice
    budget: str
    steps: int
    tokens: int


class Side:
    """A method on the device, trained and asked in turns."""

    def __init__(self, plan: Plan, method: str) -> None:
        disable_progress_bar()
        self.plan = plan
        ground = prepare_ground(plan.recipe, Console(quiet=True), plan.choice)
        self.clusters = len(ground.tasks)
        self.contender = contender_of(ground, plan.budget, method)
        self.use_ids = needs_ids(self.contender.config)
        self.ground = ground if self.use_ids else replace(ground, selector=None)
        self.prompts = prompts_of(ground, max(PROMPTS))
        set_seed(plan.recipe.seed)
        self.model: Any = _model(plan.recipe, self.contender, UNTIMED + plan.steps + 1)
        if torch.cuda.is_available():
            self.model.to("cuda")

    def train(self, mode: str) -> list[float]:
        """ms of each step of a turn, the untimed ones left out."""
        more: Result = {"learning_rate": self.contender.centre_lr, "compile": mode == "compiled"}
        more["max_steps"] = UNTIMED + self.plan.steps + 1
        train = self.plan.recipe.train.model_copy(update=more)
        recipe = self.plan.recipe.model_copy(update={"train": train})
        began: list[float] = []
        hook = self.model.register_forward_pre_hook(lambda *_: began.append(now()))
        set_seed(recipe.seed)
        try:
            _train(self.ground, recipe, self.model, self.use_ids)
        finally:
            hook.remove()
            # accelerate's autocast, which the next turn would be wrapped in once more
            for name in ("forward", "_original_forward"):
                vars(self.model).pop(name, None)
            gc.collect()
        return [round(1000 * (end - start), 3) for start, end in pairwise(began[UNTIMED:])]

    @torch.inference_mode()
    def decode(self, count: int, turn: int) -> float:
        """ms a token of so many prompts at once; one alone is another in each turn."""
        first = turn * count
        prompts = [self.prompts[i % len(self.prompts)] for i in range(first, first + count)]
        pad: Any = self.ground.tokenizer.pad_token_id
        eval_mode(self.model)
        started = now()
        ids, mask, _ = left_padded(prompts, int(pad), self.model.device)
        selector = self.ground.selector
        chosen = None if selector is None else torch.tensor(selector.choose(prompts)).to(ids)
        with nullcontext() if chosen is None else branch_ids(self.model, chosen):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=self.plan.tokens,
                max_new_tokens=self.plan.tokens,
                pad_token_id=pad,
            )
        took = now() - started
        assert output.shape == (count, ids.shape[1] + self.plan.tokens)
        return round(1000 * took / self.plan.tokens, 4)


def contender_of(ground: Ground, budget: str, method: str) -> Contender:
    recipe = ground.recipe
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    adapter = recipe.adapter.model_dump(exclude_unset=True)
    numbers = 0 if ground.selector is None else ground.selector.size
    _, (found,) = contenders([method], budget, base, len(ground.tasks), adapter, numbers)
    return found


def prompts_of(ground: Ground, count: int) -> list[list[int]]:
    """Of held-out rows: each task's first, then each task's second, and so on, over again."""
    longest = max(map(len, ground.test.values()))
    places = range(min(longest, count))
    examples = [own[i] for i in places for own in ground.test.values() if i < len(own)]
    chosen = [examples[i % len(examples)] for i in range(count)]
    return [ground.encoder.prompt_ids(example.prompt) for example in chosen]


def now() -> float:
    """The time at which the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# By method: a process has one, but several may share it.
_here: dict[str, Side] = {}


def _begin(plan: Plan, method: str, modes: Sequence[str]) -> Result:
    """The side made ready in its process: all that is done once has been done."""
    side = _here[method] = Side(plan, method)
    for mode in modes:
        side.train(mode)
    for count in PROMPTS:
        side.decode(count, 0)
    own = side.contender
    return {"label": own.label, "params": own.params, "clusters": side.clusters}


def _there(method: str, turn: Callable[..., Any], *given: Any) -> Any:
    return turn(_here[method], *given)


def process() -> Executor:
    """A process of its own, new: a forked one could not use the GPU."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _forget)


def _forget() -> None:
    """How this process was started: the data loader's are started as they are by default."""
    multiprocessing.set_start_method(None, force=True)


def measure(
    plan: Plan,
    methods: Sequence[str],
    modes: Sequence[str],
    rounds: int,
    place: Callable[[], Executor] = process,
) -> Result:
    """By method: what it is, its steps by mode and its answers by prompts at once, by round."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        places = {method: stack.enter_context(place()) for method in methods}
        begun: dict[str, Future[Result]] = {
            method: own.submit(_begin, plan, method, modes) for method, own in places.items()
        }
        found: Result = {
            method: {
                **one.result(),
                "step_ms": {mode: [] for mode in modes},
                "token_ms": {str(count): [] for count in PROMPTS},
            }
            for method, one in begun.items()
        }
        for turn in range(rounds):
            # Every other round backwards, so that a drift within a round hits all alike.
            order = list(places.items())[:: -1 if turn % 2 else 1]
            for mode in modes:
                for method, own in order:
                    took = own.submit(_there, method, Side.train, mode).result()
                    found[method]["step_ms"][mode].append(took)
            for count in PROMPTS:
                for method, own in order:
                    ms = own.submit(_there, method, Side.decode, count, turn).result()
                    found[method]["token_ms"][str(count)].append(ms)
            console.log(f"round {turn + 1} of {rounds}")
    return found


def run(
    multitask: Path,
    folder: Path,
    methods: Sequence[str],
    modes: Sequence[str],
    sizes: dict[str, int],  # steps, rounds, tokens
    model: str | None = None,
) -> Result:
    started = time.perf_counter()
    part, data = PARTS[PART], folder / "data" / PART
    write_data(multitask, data, part)
    recipe = recipe_of(part, data, model).resolved()
    plan = Plan(recipe, part.choice, part.budget, sizes["steps"], sizes["tokens"])
    found = measure(plan, methods, modes, sizes["rounds"])
    facts = {"part": PART, "budget": part.budget, "model": recipe.model, **sizes}
    facts |= {"untimed": UNTIMED, "seconds": round(time.perf_counter() - started)}
    return {**about_here(), **facts, "methods": found}


def shown(found: Result) -> str:
    """Two Markdown tables, training and decoding; all are held to the first method."""
    (name, reference), *_ = methods = list(found["methods"].items())
    of = f"of {name}'s (least to most of {found['rounds']} rounds)"
    steps = [f"| training | method | ms a step (quartiles) | {of} |", "|---|---|---:|---:|"]
    tokens = [f"| prompts at once | method | ms a token | tokens a second | {of} |"]
    tokens += ["|---:|---|---:|---:|---:|"]
    for mode, its in reference["step_ms"].items():
        for method, own in methods:
            took = own["step_ms"][mode]
            low, middle, high = quantiles(chain(*took), n=4, method="inclusive")
            cells = [mode, method, f"{middle:.1f} ({low:.1f} to {high:.1f})", _ratio(took, its)]
            steps.append(f"| {' | '.join(cells)} |")
    for count, its in reference["token_ms"].items():
        for method, own in methods:
            ms = median(own["token_ms"][count])
            cells = [count, method, f"{ms:.2f}", f"{1000 * int(count) / ms:.0f}"]
            tokens.append(f"| {' | '.join([*cells, _ratio(own['token_ms'][count], its)])} |")
    return "\n".join([*steps, "", *tokens])


def _ratio(one: Sequence[Any], other: Sequence[Any]) -> str:
    """What one took of the other's time, round by round."""
    totals = [[sum(took) if isinstance(took, list) else took for took in x] for x in (one, other)]
    found = [mine / its for mine, its in zip(*totals, strict=True)]
    return f"{median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("multitask", nargs="?", type=Path)
    parser.add_argument("--show", action="store_true", help="the tables of --output; run nothing")
    parser.add_argument("--steps", type=int, default=15, help="timed, of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="the first is 1")
    parser.add_argument("--model", help="another base model, in float32")
    parser.add_argument("--folder", type=Path, default=Path("runs/research"))
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if not given.show:
        if given.multitask is None:
            parser.error("give MULTITASK, or --show")
        sizes = {name: getattr(given, name) for name in ("steps", "rounds", "tokens")}
        found = run(*(given.multitask, given.folder, given.methods, given.mode, sizes, given.model))
        given.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(shown(json.loads(given.output.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
