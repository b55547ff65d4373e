"""Rows on disk: read once, in any order, whole; nothing half-written is ever used."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from manylora.corpus import CorpusError, Example, Rows
from manylora.corpus import store as module
from manylora.corpus.store import Store, open_store


def example(number: int, task: str = "t", text: str = "q") -> Example:
    messages = [
        {"role": "user", "content": f"{text} {number}"},
        {"role": "assistant", "content": f"ä {number}"},
    ]
    return Example(task, messages, f"{task}.jsonl:{number}")  # type: ignore[arg-type]


def many(count: int) -> list[Example | CorpusError]:
    return [example(i, "even" if i % 2 == 0 else "odd") for i in range(count)]


def opened(cache: Path, found: list[Example | CorpusError], identity: object = 1) -> Store:
    return open_store(identity, lambda: found, cache, lambda rows: None)


def test_rows_come_back_as_they_were_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLUSH_ROWS", 7)  # several batches
    found = many(50)
    store = opened(tmp_path, found)
    assert store.tasks == ["even", "odd"]
    rows = Rows(store, store.rows_of("odd"))
    assert list(rows) == found[1::2]
    assert rows[-1] == found[49]
    assert list(rows[3:6]) == found[7:13:2]
    assert list(rows.at(np.array([9, 0]))) == [found[19], found[1]]
    texts = np.array([len(f"q {i}ä {i}".encode()) for i in range(1, 50, 2)])
    assert (texts <= rows.sizes).all() and (rows.sizes <= texts + 80).all()
    assert set(rows.turns.tolist()) == {2}


def test_the_files_are_read_once(tmp_path: Path) -> None:
    calls = []

    def found() -> Iterator[Example]:
        calls.append(1)
        yield example(1)

    for _ in range(2):
        store = open_store(["a"], found, tmp_path, lambda rows: None)
        assert store.example(0) == example(1)
    assert len(calls) == 1
    open_store(["b"], found, tmp_path, lambda rows: None)
    assert len(calls) == 2


def test_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    found: list[Example | CorpusError] = [CorpusError(f"t:{i}: bad") for i in range(30)]
    store = opened(tmp_path, [*found, example(1)])
    assert store.bad == 30
    assert store.bad_shown == [f"t:{i}: bad" for i in range(10)]
    assert len(store.rows_of("t")) == 1


def test_a_reading_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Example]:
        yield example(1)
        raise CorpusError("t.jsonl: cannot be read any further")

    with pytest.raises(CorpusError, match="any further"):
        open_store(1, broken, tmp_path, lambda rows: None)
    assert [p.suffix for p in (tmp_path / "corpora").iterdir()] == [".lock"]
    assert opened(tmp_path, [example(2)]).example(0) == example(2)


def test_a_half_written_store_is_written_anew(tmp_path: Path) -> None:
    """As a killed process leaves it."""
    store = opened(tmp_path, [example(1)])
    partial = store.folder.with_suffix(".partial")
    os.rename(store.folder, partial)
    (partial / "rows.arrow").write_bytes(b"half")
    assert opened(tmp_path, [example(1)]).example(0) == example(1)
    assert not partial.exists()


def test_questions_that_differ_in_case_and_spacing_are_the_same(tmp_path: Path) -> None:
    store = opened(tmp_path, [example(1, text="Is it"), example(1, text=" is  IT"), example(2)])
    keys = Rows(store, store.rows_of("t")).keys
    assert keys[0] == keys[1] != keys[2]


def test_a_store_can_go_to_another_process(tmp_path: Path) -> None:
    store = opened(tmp_path, many(5))
    rows = pickle.loads(pickle.dumps(Rows(store, store.rows_of("odd"))))
    assert list(rows) == [many(5)[1], many(5)[3]]


def test_no_room_is_an_error_that_says_where(tmp_path: Path) -> None:
    def full() -> Iterator[Example]:
        yield example(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(CorpusError, match=r"No space left.*MANYLORA_CACHE"):
        open_store(1, full, tmp_path, lambda rows: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="MANYLORA_CACHE"):
        opened(tmp_path / "file", [example(1)])


def test_stores_that_nobody_opens_are_forgotten(tmp_path: Path) -> None:
    old, used = opened(tmp_path, [example(1)], "old"), opened(tmp_path, [example(2)], "used")
    long_ago = time.time() - 40 * 86400
    os.utime(old.folder, (long_ago, long_ago))
    os.utime(used.folder, (long_ago, long_ago))
    opened(tmp_path, [example(2)], "used")
    opened(tmp_path, [example(3)], "new")
    assert used.folder.exists() and not old.folder.exists()
