"""The rows of a corpus: which are trained on, which decide when to stop, which are held out.

Rows are split by what they ask, not by where they stand: rows that ask the same fall on one side,
the order of the file does not matter, and the same seed gives the same split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from manylora.cache import cache_folder
from manylora.corpus.layouts import CorpusError, Example, Fields
from manylora.corpus.mixture import mixed
from manylora.corpus.origins import Data, Part, train_and_test
from manylora.corpus.store import SHOWN, Count, Rows, Store, open_store


@dataclass(frozen=True)
class Corpus:
    """Rows by task; a task may be without held-out rows only when the given test/ has none for it.

    skipped: how many rows could not be used and were left out (`on_bad_row: skip`), and the
    messages of the first ones. content: the same for the same rows. unread: by file, its columns
    that no example has anything of.
    """

    train: dict[str, Rows]
    test: dict[str, Rows]
    validation: dict[str, Rows] = field(default_factory=dict)
    content: str = ""
    skipped: int = 0
    skipped_shown: tuple[str, ...] = ()
    unread: dict[str, list[str]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.train)

    def without(self, tasks: Sequence[str]) -> Corpus:
        """The corpus less the rows of some tasks; CorpusError for one that is none, or for all."""
        if unknown := sorted(set(tasks) - set(self.train)):
            raise CorpusError(
                f"leave_out names {', '.join(unknown)}, and the tasks are {', '.join(self.train)}."
            )
        if not set(self.train) - set(tasks):
            raise CorpusError(f"leave_out={list(tasks)} leaves no task to train on.")

        def kept(split: dict[str, Rows]) -> dict[str, Rows]:
            return {task: rows for task, rows in split.items() if task not in tasks}

        return replace(
            self, train=kept(self.train), test=kept(self.test), validation=kept(self.validation)
        )


@dataclass(frozen=True)
class DataOptions:
    """How the files are read and split; the recipe's keys of the same names."""

    fields: Fields = field(default_factory=Fields)
    skip_bad_rows: bool = False
    holdout: float = 0.1
    validation: float = 0.0
    seed: int = 0


def load_corpus(
    data: Data | Path, options: DataOptions | None = None, count: Count = lambda rows: None
) -> Corpus:
    """Read the rows, unless that was done before, and split them.

    Args:
        data: a file, a folder (one file or sub-folder a task; perhaps with train/ and test/), a
            hub data set, several of these, or {task: file or folder}.
        count: told how many rows have been read, from time to time.

    Raises CorpusError naming the first unusable rows, unless they are to be skipped.
    """
    options = options or DataOptions()
    corpus = read_rows(data, options, count)
    train, test, validation = corpus.train, corpus.test, corpus.validation
    if not test:
        train, test = _split_all(train, options.holdout, f"{options.seed}:test")
    if options.validation:
        train, validation = _split_all(train, options.validation, f"{options.seed}:validation")
    return replace(corpus, train=train, test=test, validation=validation)


def read_rows(
    data: Data | Path, options: DataOptions | None = None, count: Count = lambda rows: None
) -> Corpus:
    """As `load_corpus`, but nothing is split: all rows are in `train`, or those of a test/ that the
    data have in `test`."""
    options = options or DataOptions()
    kept, apart = train_and_test(data)
    store = _read(kept, options, count)
    train = {task: Rows(store, store.rows_of(task)) for task in sorted(store.tasks)}
    corpus = Corpus(
        train,
        test={},
        content=store.content,
        skipped=store.bad,
        skipped_shown=tuple(store.bad_shown),
        unread=store.unread,
    )
    return _with_test(corpus, apart, _read(apart, options, count)) if apart else corpus


def _with_test(corpus: Corpus, parts: list[Part], held: Store) -> Corpus:
    """The corpus with the held-out rows that the data have themselves."""
    for task in sorted(held.tasks):
        if task not in corpus.train:
            raise CorpusError(
                f"{parts[0].where}: task {task!r} is not in the training rows, which have "
                f"{', '.join(corpus.train)}. Add training rows of it or remove the test rows."
            )
    return replace(
        corpus,
        test={task: Rows(held, held.rows_of(task)) for task in sorted(held.tasks)},
        content=f"{corpus.content} {held.content}",
        skipped=corpus.skipped + held.bad,
        skipped_shown=(*corpus.skipped_shown, *held.bad_shown)[:SHOWN],
        unread={**corpus.unread, **held.unread},
    )


def _read(parts: list[Part], options: DataOptions, count: Count) -> Store:
    identity = [[part.identity() for part in parts], options.fields.model_dump()]
    unread: dict[str, list[str]] = {}

    def found() -> Iterator[Example | CorpusError]:
        for part in parts:
            columns: set[str] = set()
            yield from part.examples(options.fields, columns)
            if columns:
                unread[part.where] = sorted(columns)

    store = open_store(identity, found, cache_folder(), count, unread)
    if store.bad and not options.skip_bad_rows:
        more = f"\n  and {store.bad - SHOWN:,} more" if store.bad > SHOWN else ""
        raise CorpusError(
            f"{store.bad:,} rows cannot be used:\n  "
            + "\n  ".join(store.bad_shown)
            + f"{more}\nMend them, or leave them out with on_bad_row=skip."
        )
    if not store.tasks:
        places = ", ".join(part.where for part in parts[:3])
        raise CorpusError(f"{places}: no row that can be used. Add rows.")
    return store


def _split_all(
    tasks: dict[str, Rows], share: float, salt: str
) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """(the rest, the share that is kept apart) of every task."""
    if not 0.0 < share < 1.0:
        raise CorpusError(
            f"{share} is no share of the rows to keep apart: give a number between 0 and 1, for "
            "instance 0.1."
        )
    rest, apart = {}, {}
    for task, rows in tasks.items():
        rest[task], apart[task] = split(task, rows, share, salt)
    return rest, apart


def split(task: str, rows: Rows, share: float, salt: str) -> tuple[Rows, Rows]:
    """Rows that ask the same form a group, which falls on one side as a whole.

    Groups are taken in the order of their hash as long as they fit; at least one is taken.
    """
    if len(rows) < 2:
        raise CorpusError(
            f"{rows[0].source}: task {task!r} has one row, and one is needed for training and one "
            "to keep apart. Add rows, or give folders train/ and test/."
        )
    keys = mixed(rows.keys, salt)
    groups, sizes = np.unique(keys, return_counts=True)
    if len(groups) < 2:
        raise CorpusError(
            f"{rows[0].source}: the {len(rows)} rows of task {task!r} all ask the same, so none "
            "can be kept apart. Add rows, or give train/ and test/."
        )
    wanted = min(max(1, round(share * len(rows))), len(rows) - 1)
    # Whole groups in order while they fit; the many of one row each go the fast way.
    fits = np.cumsum(sizes) <= wanted
    taken = list(groups[fits])
    room = wanted - int(sizes[fits].sum())
    for group, size in zip(groups[~fits], sizes[~fits], strict=True):
        if not room:
            break
        if size <= room:
            taken.append(group)
            room -= int(size)
    if not taken:
        taken = [groups[np.argmin(sizes)]]
    apart = np.isin(keys, np.array(taken, dtype=np.uint64))
    return rows.at(~apart), rows.at(apart)
