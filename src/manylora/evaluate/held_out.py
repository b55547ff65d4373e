"""Scoring a run on its held-out rows: before and after training, and again from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from manylora.adapter.selector import BranchSelector
from manylora.corpus import Corpus, Encoder
from manylora.evaluate.programs import Programs, own_answers_that_fail
from manylora.evaluate.scores import HeldOut, Metrics, held_out, score_tasks, write_scores
from manylora.inspect.routing import RoutingMeter, write_routing
from manylora.inspect.selector import choices_of, write_choices
from manylora.precision import autocast
from manylora.recipe import Recipe
from manylora.run import config_of, load, recipe_of
from manylora.training.clusters import KEPT, settle
from manylora.training.validation import eval_mode


@dataclass
class Scorer:
    """Scores one model on the held-out rows of a recipe's corpus.

    programs: those that the model writes for rows with tests are run, for pass@k.
    """

    recipe: Recipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    console: Console
    task_ids: list[str]
    """Names of the tasks in the order of their ids."""
    programs: Programs | None = None
    selector: BranchSelector | None = None
    """What picks the branch of a prompt, known once an adapter was scored."""

    def __post_init__(self) -> None:
        wanted = self.recipe.evaluate.rows_per_task
        self.tasks: list[HeldOut] = []
        if wanted:
            encoder = Encoder(self.tokenizer, self.recipe.max_length)
            self.tasks, notes = held_out(self.corpus, encoder, wanted)
            if self.programs is not None:
                notes += _notes_on_tests(self.tasks, self.programs)
            for note in notes:
                self.console.print(note, style="yellow", markup=False)

    def base(self, model: PeftModel) -> dict[str, Metrics]:
        """Scores of the base model: the adapter is switched off."""
        with model.disable_adapter():
            return self._score(model, "base model", None, None)

    def adapter(self, model: PeftModel) -> tuple[dict[str, Metrics], RoutingMeter]:
        """Scores with the adapter, and where its router sent the tokens."""
        meter = RoutingMeter(model, self.task_ids)
        config = config_of(model)
        self.selector, use_ids = config.branch_selector, config.branches_of().needs_ids
        branches = self._branches() if use_ids else None
        return self._score(model, "adapter", meter, branches), meter

    def _branches(self) -> dict[str, list[int]]:
        """Of the rows of each task: told, or chosen from their prompts."""
        if self.recipe.choice == "told" or self.selector is None:
            return {
                task.name: [self.task_ids.index(task.name)] * len(task.encoded)
                for task in self.tasks
            }
        return {
            task.name: self.selector.choose(
                [item.input_ids[: item.prompt_length] for item in task.encoded]
            )
            for task in self.tasks
        }

    def _programs_said(self) -> str:
        tested = sum(len(task.tested) for task in self.tasks)
        if self.programs is None or not tested:
            return ""
        each = "a program" if self.programs.samples == 1 else f"{self.programs.samples} programs"
        return f", with {each} for each of {tested} that have tests"

    def write(
        self, run: Path, before: dict[str, Metrics], after: dict[str, Metrics], meter: RoutingMeter
    ) -> None:
        """scores.json and, where the adapter has such, routing.json and selector.json."""
        write_scores(run, self.tasks, before, after)
        routing = meter.result(self.tokenizer) if self.tasks else None
        if routing is not None:
            write_routing(run, routing)
        if self.selector is not None and self.tasks:
            encoded = {task.name: task.encoded for task in self.tasks}
            write_choices(run, choices_of(self.selector, encoded))

    def _score(
        self,
        model: PeftModel,
        what: str,
        meter: RoutingMeter | None,
        branches: dict[str, list[int]] | None,
    ) -> dict[str, Metrics]:
        rows = sum(len(task.examples) for task in self.tasks)
        eval_mode(model)
        if rows:
            self.console.print(f"scoring the {what} on {rows} held-out rows{self._programs_said()}")
        with autocast(self.recipe.train.precision, model.device):
            return score_tasks(
                model,
                self.tokenizer,
                self.tasks,
                self.task_ids,
                self.recipe.evaluate.batch_size,
                branches,
                self.recipe.evaluate.generate,
                meter,
                self.programs,
            )


def _notes_on_tests(tasks: Sequence[HeldOut], programs: Programs) -> list[str]:
    """What a reader of pass@k has to know; finds it by running the rows' own answers."""
    notes = []
    for task in tasks:
        tested = [task.examples[row] for row in task.tested]
        if len(tested) == 1:
            notes.append(
                f"{task.name}: one held-out row has tests, which gives no interval; not run"
            )
        if len(tested) < 2:
            continue
        if len(tested) < len(task.examples):
            notes.append(
                f"{task.name}: {len(tested)} of {len(task.examples)} held-out rows have tests; "
                "pass@k is theirs"
            )
        notes += filter(None, [own_answers_that_fail(task.name, tested, programs)])
    if not any(task.tested for task in tasks):
        notes.append(
            "no held-out row has tests (columns tests, test_list, or test with entry_point), so "
            "there is no pass@k"
        )
    return notes


def evaluate_run(
    run: Path,
    console: Console,
    programs: Programs | None = None,
    batch_size: int | None = None,
) -> None:
    """Score a finished run again, from its folder alone; rewrites what `Scorer.write` writes.

    programs: the user lets programs that the model writes run here, for pass@k of rows with tests.
    batch_size: rows at a time; default the recipe's.
    """
    recipe = recipe_of(run)
    if batch_size is not None:
        scoring = recipe.evaluate.model_copy(update={"batch_size": batch_size})
        recipe = recipe.model_copy(update={"evaluate": scoring})
    corpus = settle(recipe, recipe.load_corpus(), console, run / KEPT).corpus
    model, tokenizer = load(run)
    selector = config_of(model).branch_selector
    ids = corpus.tasks if selector is None else selector.names
    scorer = Scorer(recipe, corpus, tokenizer, console, ids, programs)
    before = scorer.base(model)
    scorer.write(run, before, *scorer.adapter(model))
