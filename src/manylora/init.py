"""`manylora init`: a commented recipe for a person's own files.

The files are read as training would read them, so that what the recipe says of them is measured:
tasks, rows, a max_length that no row exceeds, the column that names the task.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from rich.console import Console

from manylora.base import DEFAULT_MODEL, load_tokenizer
from manylora.corpus import Corpus, Encoder
from manylora.recipe import Recipe, parse_recipe
from manylora.training.prepare import read_corpus

_LONGEST_ROWS = 50
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_TASK_COLUMNS = ("task", "task_name", "category")

_TEMPLATE = """\
# A recipe of manylora. Run it:            manylora train {file}
# See what it would train on:              manylora data {file}
# See what would go wrong, and the memory: manylora doctor {file}
# Compare methods at equal parameters:     manylora compare {file} validation=0.05
# Any key can be changed on the command line, as in train.epochs=1.

model: {model}   # or owner/name@revision, a folder, a .gguf file
# quantize: 4bit                 # or 8bit; needs pip install 'manylora[quantized]'

{data}
{tasks}
{fields}
# tasks: discovered              # clusters of alike prompts; or a folder of `manylora discover`
# on_bad_row: skip               # default refuse: a row that cannot be used stops the run
# validation: 0.05               # share of the training rows kept apart; `compare` needs it
mixture: {mixture}   # proportional, balanced, {{temperature: 2}}, {{weights: {{TASK: 1.0}}}}
max_length: {max_length}   # tokens; {longest}
# packing: true                  # several short rows in one: faster where lengths differ

adapter:
  method: hydralora              # lora, lora_split, multilora, lora_moe, branch_per_cluster
  r: 8                           # rank of each branch
  # num_branches: 3              # the default; auto: as many as the prompts have clusters
  # lora_alpha: 16               # the default; given here, `compare` holds all methods to it
  lora_dropout: 0.0

train:
  epochs: 3                      # or max_steps
  batch_size: 8
  gradient_accumulation: 1
  learning_rate: 1e-3            # peak, cosine schedule with warm-up
  warmup: 0.05                   # share of the steps
  # rates: {{B: 16}}               # learning rate of a part, as a multiple (A, B, router, ...)
  # evaluate_every: 50           # with `validation: 0.05` above: loss on rows kept apart
  # early_stopping: 3            # stop after so many evaluations without a better one
  # report_to: tensorboard       # or wandb, trackio
  # compile: true                # shorter steps on a GPU; the first ones wait for the compiler

evaluate:
  rows_per_task: 100             # held-out rows scored before and after

seed: 0
output: {output}
"""


def init(data: list[str], file: Path, console: Console, model: str = DEFAULT_MODEL) -> Recipe:
    """Read the data and write a recipe for them and the model to `file`; returns the recipe.

    Raises CorpusError for data that cannot be used, FileExistsError for a file that is there.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists; give another name with --output, or remove it")
    values: dict[str, object] = {
        "model": model,
        "data": data[0] if len(data) == 1 else data,
        "fields": {},
    }
    recipe = parse_recipe(values)
    corpus = read_corpus(recipe, console)
    column = task_column(corpus)
    if column is not None:
        recipe = parse_recipe({**values, "fields": {"task": column}})
        corpus = read_corpus(recipe, console)
    text = _text(recipe, corpus, column, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return parse_recipe(yaml.safe_load(text), str(file))


def task_column(corpus: Corpus) -> str | None:
    """The column that names the task of each row, where all rows are of one file."""
    if len(corpus.tasks) > 1:
        return None
    unread = {column for columns in corpus.unread.values() for column in columns}
    return next((name for name in _TASK_COLUMNS if name in unread), None)


def _text(recipe: Recipe, corpus: Corpus, column: str | None, file: Path) -> str:
    longest = _longest(corpus, recipe.model)
    length = next((size for size in _LENGTHS if size >= longest), _LENGTHS[-1])
    rows = {task: len(corpus.train[task]) for task in corpus.tasks}
    uneven = max(rows.values()) > 10 * min(rows.values())
    shown = [f"{task} ({count:,} rows)" for task, count in list(rows.items())[:12]]
    more = f" and {len(rows) - 12} more" if len(rows) > 12 else ""
    said = f"the longest row has {longest:,}" + (", longer ones are left out" * (longest > length))
    return _TEMPLATE.format(
        file=file,
        model=recipe.model,
        data=yaml.safe_dump({"data": recipe.data}, default_flow_style=False).rstrip(),
        tasks=f"# {len(rows)} tasks to train on: {', '.join(shown)}{more}",
        fields=yaml.safe_dump({"fields": {"task": column}}).rstrip()
        if column
        else "# fields: {prompt: COLUMN, output: COLUMN, task: COLUMN}   # where names do not say",
        mixture="balanced" if uneven else "proportional",
        max_length=length,
        longest=said,
        output=f"runs/{file.stem}",
    )


def _longest(corpus: Corpus, model: str) -> int:
    """Tokens of the longest row."""
    encoder = Encoder(load_tokenizer(model), max_length=2**31)
    found = 0
    for rows in corpus.train.values():
        most = rows.at(np.argsort(rows.sizes, kind="stable")[-_LONGEST_ROWS:])
        found = max([found, *(len(item.input_ids) for item in encoder.split_too_long(most)[0])])
    return found
