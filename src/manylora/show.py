"""`manylora data`: what a run would train on, before it is run, or has trained on.

The mixture, the columns that are not read, and some rows as the model gets them: token by token,
with what is learned marked.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from manylora.base import load_tokenizer
from manylora.corpus import CorpusError, Encoded, Encoder, mixture_table, print_mixture
from manylora.corpus.readers import files_not_read
from manylora.discovery.show import headline
from manylora.recipe import Recipe
from manylora.training.clusters import settle
from manylora.training.prepare import fitting, read_corpus


def show_data(
    recipe: Recipe,
    out: Console,
    notes: Console,
    task: str | None = None,
    row: int = 0,
    kept: Path | None = None,
) -> None:
    """Print the mixture and one training row of `task` (default: of every task).

    row: its number among the task's training rows, from 0. notes: for what is left out. kept: the
    discovery of a run, whose clusters are shown.
    """
    settled = settle(recipe, read_corpus(recipe, notes), notes, kept)
    recipe, corpus = settled.recipe, settled.corpus
    if kept is not None and settled.found is not None:
        said = f"{kept}: {headline(settled.found)} ({settled.found.chosen_by})"
        notes.print(said, markup=False, highlight=False, soft_wrap=True)
    tokenizer = load_tokenizer(recipe.model)
    encoder = Encoder(tokenizer, recipe.max_length)
    train = {name: fitting(name, corpus.train[name], encoder, notes) for name in corpus.tasks}
    print_mixture(mixture_table(train, recipe.mixture, encoder), out)
    held = ", ".join(f"{name} {len(rows):,}" for name, rows in corpus.test.items())
    out.print(f"held out: {held}", soft_wrap=True, highlight=False)
    if isinstance(recipe.data, str) and Path(recipe.data).is_dir():
        for file in files_not_read(Path(recipe.data)):
            out.print(f"file not read: {file}", markup=False, highlight=False, soft_wrap=True)
    unread = Counter(column for columns in corpus.unread.values() for column in columns)
    for column, count in unread.items():
        files = "1 file" if count == 1 else f"{count} files"
        out.print(f"column not read: {column} (in {files})", markup=False, highlight=False)
    if task is not None and task not in train:
        raise CorpusError(f"no task {task!r} in the data; it has {', '.join(train)}")
    for name in [task] if task else train:
        if not 0 <= row < len(train[name]):
            raise CorpusError(
                f"task {name!r} has {len(train[name])} training rows, numbered from 0; there is "
                f"no row {row}"
            )
        print_tokens(encoder.encode(train[name][row]), tokenizer, out)


def print_tokens(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, out: Console) -> None:
    """The tokens of an example in stretches that are learned and that are not."""
    learned = {place for start, stop in encoded.learned for place in range(start, stop)}
    out.print(
        Text.assemble(
            (f"\n{encoded.task}, {encoded.source}", "bold"),
            f": {len(encoded.input_ids)} tokens, {encoded.answer_tokens} of them learned",
        ),
        soft_wrap=True,
    )
    for is_learned, places in groupby(range(len(encoded.input_ids)), lambda at: at in learned):
        ids = [encoded.input_ids[at] for at in places]
        pieces = [str(tokenizer.decode([token])) for token in ids]
        style = "bold green" if is_learned else "dim"
        head = f"  {'learned' if is_learned else 'read'} ({len(ids)}): "
        out.print(
            Text.assemble((head, style), ("│".join(map(_visible, pieces)), style)), soft_wrap=True
        )


def _visible(piece: str) -> str:
    return piece.replace("\n", "↵").replace("\t", "⇥")
