"""Scoring a run on its held-out rows: before and after training, and again from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from manylora.corpus import Corpus, Encoder
from manylora.evaluate.scores import HeldOut, Metrics, held_out, score_tasks, write_scores
from manylora.inspect.routing import RoutingMeter, write_routing
from manylora.precision import autocast
from manylora.recipe import Recipe
from manylora.run import config_of, load, recipe_of
from manylora.training.clusters import KEPT, settle
from manylora.training.validation import eval_mode


@dataclass
class Scorer:
    """Scores one model on the held-out rows of a recipe's corpus."""

    recipe: Recipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    console: Console
    task_ids: list[str]
    """Names of the tasks in the order of their ids."""

    def __post_init__(self) -> None:
        wanted = self.recipe.evaluate.rows_per_task
        self.tasks: list[HeldOut] = []
        if wanted:
            encoder = Encoder(self.tokenizer, self.recipe.max_length)
            self.tasks, notes = held_out(self.corpus, encoder, wanted)
            for note in notes:
                self.console.print(note, style="yellow", markup=False)

    def base(self, model: PeftModel) -> dict[str, Metrics]:
        """Scores of the base model: the adapter is switched off."""
        with model.disable_adapter():
            return self._score(model, "base model", None, False)

    def adapter(self, model: PeftModel) -> tuple[dict[str, Metrics], RoutingMeter]:
        """Scores with the adapter, and where its router sent the tokens."""
        meter = RoutingMeter(model, self.task_ids)
        use_ids = config_of(model).branches_of().needs_ids
        return self._score(model, "adapter", meter, use_ids), meter

    def write(
        self, run: Path, before: dict[str, Metrics], after: dict[str, Metrics], meter: RoutingMeter
    ) -> None:
        write_scores(run, self.tasks, before, after)
        routing = meter.result() if self.tasks else None
        if routing is not None:
            write_routing(run, routing)

    def _score(
        self, model: PeftModel, what: str, meter: RoutingMeter | None, use_ids: bool
    ) -> dict[str, Metrics]:
        rows = sum(len(task.examples) for task in self.tasks)
        eval_mode(model)
        if rows:
            self.console.print(f"scoring the {what} on {rows} held-out rows")
        with autocast(self.recipe.train.precision, model.device):
            return score_tasks(
                model,
                self.tokenizer,
                self.tasks,
                self.task_ids,
                self.recipe.evaluate.batch_size,
                use_ids,
                self.recipe.evaluate.generate,
                meter,
            )


def evaluate_run(run: Path, console: Console) -> None:
    """Score a finished run again, from its folder alone; rewrites scores.json and routing.json."""
    recipe = recipe_of(run)
    corpus = settle(recipe, recipe.load_corpus(), console, run / KEPT).corpus
    model, tokenizer = load(run)
    selector = config_of(model).branch_selector
    ids = corpus.tasks if selector is None else selector.names
    scorer = Scorer(recipe, corpus, tokenizer, console, ids)
    before = scorer.base(model)
    scorer.write(run, before, *scorer.adapter(model))
