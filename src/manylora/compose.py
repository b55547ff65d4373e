"""LoraHub: an adapter for a new task out of adapters for others, from a few examples alone.

    w = argmin over [-1.5, 1.5]^n of  NLL(examples; w) + 0.05 mean_i |w_i|

found without gradients (composing/search.py). What w makes of the adapters, in the authors' way or
as a sum of products, is in composing/combined.py. Only tensors of one small LoRA change from trial
to trial, in place. Source: Huang et al., arXiv 2307.13269; here for causal models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from manylora.base import Dtype, load_model, load_tokenizer, name_and_revision
from manylora.composing.combined import Combined, Way, check_ranks
from manylora.composing.few_shot import few_shot
from manylora.composing.folder import new_folder, write_card, write_record
from manylora.composing.search import TRIALS_PER_WEIGHT, best_of, watched_search
from manylora.composing.updates import AdapterFolder, adapter_folder, read_layers, shared_base
from manylora.corpus import Data, Encoded, Encoder, Fields, absolute
from manylora.evaluate.answers import Question, score_answers
from manylora.evaluate.scores import Metrics, score_tasks, write_scores


class ComposeError(ValueError):
    """What cannot be composed as asked, and what to do instead."""


def compose(
    adapters: Sequence[Path],
    rows: Data,
    examples: int = 20,
    way: Way = "products",
    budget: int = 40,
    seed: int = 0,
    output: Path = Path("runs/composed"),
    console: Console | None = None,
    *,
    fields: Fields | None = None,
    dtype: Dtype = "float32",
    max_length: int = 1024,
) -> Path:
    """Search the weights of some adapters on a few examples of a new task; leave a plain LoRA.

    Args:
        adapters: folders of plain LoRA adapters, manylora runs or exports, of one base model.
        rows: the new task's rows, as a recipe's `data`; those that are no examples are held out.
        examples: how many rows the search sees; at most half of them.
        way: "products", any ranks, or "factors", as the authors' code.
        budget: how many vectors of weights to try, besides 0; at most 50 for each adapter.
        seed: of which rows are examples, and of the search where that draws random numbers.
        output: the folder to write; it may hold nothing yet.
        console: for progress; default stderr.
        fields: which columns of the rows hold what, where their names do not say it.
        dtype: of the base model.
        max_length: rows of more tokens are left out.

    Returns `output`: a LoRA that PEFT loads without manylora, compose.json, scores.json, README.md.
    Raises ComposeError, AdapterError, CorpusError or BaseModelError, before anything is written.
    """
    console = console or Console(stderr=True)
    _check(adapters, examples, way, budget, output)
    folders = [adapter_folder(Path(path)) for path in adapters]
    base = shared_base(folders)
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer, max_length)
    data = few_shot(rows, fields or Fields(), examples, seed, encoder, console)
    combined = _combined(base, folders, way, dtype)

    def scores() -> dict[str, Metrics]:
        return score_tasks(combined.model, tokenizer, data.held_out, [data.task])

    console.print(f"{len(data.shots)} examples, {data.scored} held-out rows", highlight=False)
    before = scores()  # all weights are 0: the base model's
    nll = ExamplesNLL(combined, data.shots, int(tokenizer.pad_token_id))
    trials = watched_search(nll, len(folders), budget, seed, console)
    best = best_of(trials)
    if not any(best.weights):
        console.print(
            f"none of {budget} vectors of weights has a lower loss on the examples than the base "
            "model alone, so the adapter changes nothing",
            style="yellow",
        )
    combined.set_weights(best.weights)
    after = scores()
    settings = {"model": base, "way": way, "data": absolute(rows), "seed": seed, "budget": budget}
    with new_folder(output) as partial:
        combined.model.save_pretrained(str(partial))
        write_scores(partial, data.held_out, before, after)
        write_card(partial, output.name, name_and_revision(base)[0], data.task, folders, best)
        write_record(partial, settings, folders, data, trials)
    return output


class ExamplesNLL:
    """Nats a token of the examples' answers for given weights, a mean over the examples."""

    def __init__(self, combined: Combined, shots: Sequence[Encoded], pad_token_id: int) -> None:
        self.combined, self.pad_token_id = combined, pad_token_id
        self.questions = [
            Question(s.input_ids[: s.prompt_length], [s.input_ids[s.prompt_length :]], 0, 0)
            for s in shots
        ]

    def __call__(self, weights: Sequence[float]) -> float:
        self.combined.set_weights(weights)
        found = score_answers(self.combined.model, self.questions, self.pad_token_id)
        return float(np.mean([-score.log_likelihood / score.tokens for (score,) in found]))


def _check(adapters: Sequence[Path], examples: int, way: str, budget: int, output: Path) -> None:
    if importlib.util.find_spec("nevergrad") is None:
        raise ComposeError(
            "compose needs nevergrad, which is not installed: run  pip install 'manylora[compose]'"
        )
    if not adapters:
        raise ComposeError("no adapter is given; give at least one adapter or run folder")
    places = [Path(path).resolve() for path in adapters]
    for path, place in zip(adapters, places, strict=True):
        if places.count(place) > 1:
            raise ComposeError(f"{path} is given more than once; give each adapter once")
    if way not in get_args(Way):
        raise ComposeError(f"way={way!r} is not known; give one of {', '.join(get_args(Way))}")
    for name, value in (("examples", examples), ("budget", budget)):
        if value < 1:
            raise ComposeError(f"{name}={value}: give at least 1")
    if budget > (most := TRIALS_PER_WEIGHT * len(adapters)):
        raise ComposeError(
            f"budget={budget} is more than the search can use for {len(adapters)} adapters; give "
            f"at most {most}"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ComposeError(f"{output} is not an empty folder; choose another with --output")


def _combined(base: str, folders: Sequence[AdapterFolder], way: Way, dtype: Dtype) -> Combined:
    model: Any = load_model(base, dtype)
    if torch.cuda.is_available():
        model.to("cuda")
    adapters = [read_layers(model, folder) for folder in folders]
    if way == "factors":
        check_ranks([folder.path for folder in folders], adapters)
    return Combined(model, adapters, way, name_and_revision(base)[1])
