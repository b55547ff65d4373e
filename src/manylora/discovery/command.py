"""`manylora discover`: the tasks hidden in a person's own files, left in a folder.

All rows are read and none is held out, so that a recipe that takes the clusters for its tasks finds
each of its rows among them, however it splits them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape

from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.base import DEFAULT_MODEL, load_tokenizer
from manylora.corpus import Corpus, Data, DataOptions, Encoder, Example, Rows, read_rows
from manylora.discovery.corpus import documents_of
from manylora.discovery.discover import Documents, Found, discover
from manylora.discovery.embeddings import ModelEmbedding, embeddings
from manylora.discovery.folder import PAGE_FILE, empty_folder, write_discovery
from manylora.discovery.options import DiscoveryOptions
from manylora.discovery.result import ASSIGNMENTS_FILE, DISCOVERY_FILE
from manylora.discovery.show import print_discovery
from manylora.discovery.space import Embedding
from manylora.init import task_column
from manylora.recipe import RecipeError, load_recipe
from manylora.training.prepare import prompts_of, prompts_of_each, reading

_LONG = 60.0  # seconds that the model reads, from which on they are announced
_CHANGES = ("fields", "on_bad_row")


def discover_files(
    data: Sequence[str],
    output: Path,
    options: DiscoveryOptions | None = None,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    console: Console | None = None,
) -> Found:
    """Find the clusters of all rows of some data, and write them to the folder `output`.

    Args:
        data: files, folders, hub data sets or `samples`, as a recipe's `data`; and how to read
            their rows, in the recipe's words: "fields.prompt=COLUMN", "on_bad_row=skip".
        options: how to look.
        model: whose tokenizer the branch selector reads prompts with; with `features="model"` it
            reads the documents too.
        console: for progress and warnings; default stderr.

    Returns what was found; each row's cluster is in the order of assignments.parquet. Raises
    CorpusError for data that cannot be used, FileExistsError for a folder that is in use.
    """
    options, console = options or DiscoveryOptions(), console or Console(stderr=True)
    changes = [word for word in data if "=" in word and not Path(word).exists()]
    where = [word for word in data if word not in changes]
    reads = _reads(where, changes)
    with empty_folder(output):
        encoder = Encoder(load_tokenizer(model), max_length=2**31)
        corpus = _read(where, reads, console)
        parts = [*corpus.train.items(), *corpus.test.items()]
        for _, rows in parts:
            encoder.encode(rows[0])  # what the model's template cannot write is known at once
        documents = documents_of(parts)
        with console.status("looking at the documents") as status:

            def say(text: str) -> None:
                status.update(escape(text))

            make = embeddings(options, model, seed, say)
            _announce(make(), documents, options, console)
            found = discover(documents, options, seed, make, say)
            status.update("learning what sends a prompt to its cluster")
            selector = _selector(found, [rows for _, rows in parts], encoder)
            status.update("writing the folder")
            keys = np.concatenate([rows.keys for _, rows in parts])
            write_discovery(found, documents, keys, output, selector)
    return found


def print_found(found: Found, output: Path, out: Console) -> None:
    """Write what was found to the terminal, and what to do with the folder."""
    print_discovery(found.discovery, out)
    out.print(
        f"{output}: {PAGE_FILE}, {DISCOVERY_FILE}, {ASSIGNMENTS_FILE}, {SELECTOR_FILE}\n"
        f"next: tasks: {output} in a recipe trains with the clusters as tasks; "
        "adapter.num_branches: auto takes their number",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _reads(data: Sequence[str], changes: Sequence[str]) -> DataOptions:
    for change in changes:
        if change.partition("=")[0].partition(".")[0] not in _CHANGES:
            raise RecipeError(
                f"{change!r} is no file or folder, and does not say how rows are read; besides "
                "data, `manylora discover` takes fields.NAME=COLUMN and on_bad_row=skip"
            )
    recipe = load_recipe(None, [f"data={json.dumps(list(data))}", *changes])
    return DataOptions(fields=recipe.fields, skip_bad_rows=recipe.on_bad_row == "skip")


def _read(data: list[str], options: DataOptions, console: Console) -> Corpus:
    """All rows; filed under the column that names their task where one file has such a column."""
    where: Data = data[0] if len(data) == 1 else data
    corpus = reading(lambda count: read_rows(where, options, count), console)
    column = None if options.fields.task else task_column(corpus)
    if column is None:
        return corpus
    console.print(f"tasks, to compare with: the column {column!r}", markup=False, highlight=False)
    named = replace(options, fields=options.fields.model_copy(update={"task": column}))
    return reading(lambda count: read_rows(where, named, count), console)


def _announce(
    embedding: Embedding, documents: Documents, options: DiscoveryOptions, console: Console
) -> None:
    """Say how long the model is going to read, where that is long."""
    if not isinstance(embedding, ModelEmbedding):
        return
    texts = documents.texts
    # The sample, as much again for the control, and every row to be assigned.
    readings = 2 * min(options.learned_from, len(texts)) + len(texts)
    seconds = embedding.states.seconds(texts) * readings
    if seconds > _LONG:
        console.print(
            f"{len(texts):,} documents are about {seconds / 60:,.0f} minutes of reading for "
            f"{embedding.states.name} here; --features tfidf takes seconds",
            style="yellow",
            markup=False,
            highlight=False,
        )


def _selector(found: Found, parts: Sequence[Rows], encoder: Encoder) -> BranchSelector:
    """What sends a new prompt to its cluster, from prompts spread over each cluster."""
    names = found.discovery.names
    most = prompts_of_each(len(names))
    examples = {}
    for cluster in range(len(names)):
        places = np.flatnonzero(found.labels == cluster)
        few = np.unique(np.linspace(0, len(places) - 1, min(len(places), most)).astype(int))
        examples[cluster] = _examples(places[few], parts)
    return BranchSelector.fit(*prompts_of(examples, encoder), names)


def _examples(places: npt.NDArray[np.int64], parts: Sequence[Rows]) -> Iterator[Example]:
    """The examples at these places of all rows one after the other."""
    ends = np.cumsum([len(rows) for rows in parts])
    for place in places:
        part = int(np.searchsorted(ends, place, side="right"))
        yield parts[part][int(place - ends[part])]
