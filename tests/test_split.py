"""Which rows are trained on and which are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.corpus import Corpus, CorpusError, DataOptions, load_corpus, samples_path
from manylora.corpus.split import split
from manylora.corpus.store import Rows, open_store
from test_store import example


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


def row(number: int, **changes: object) -> dict[str, object]:
    return {"instruction": "Add one.", "input": str(number), "output": str(number + 1)} | changes


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def loaded(data: Any, **options: Any) -> Corpus:
    return load_corpus(data, DataOptions(**options))


def asked(corpus: Corpus, task: str = "t") -> set[str]:
    return {item.prompt[0]["content"] for item in corpus.test[task]}


def test_given_train_and_test_folders_are_kept(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / "train" / f"{name}.jsonl", [row(1), row(2)])
    write(tmp_path / "test" / "a.jsonl", [row(3)])
    corpus = loaded(tmp_path)
    assert corpus.tasks == ["a", "b"]
    assert len(corpus.train["a"]) == 2
    assert asked(corpus, "a") == {"Add one.\n3"}
    assert "b" not in corpus.test


def test_a_test_task_that_is_not_trained_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", [row(1)])
    write(tmp_path / "test" / "z.jsonl", [row(1)])
    said = r"test/z.jsonl: task 'z' is not in the training rows, which have a"
    with pytest.raises(CorpusError, match=said):
        loaded(tmp_path)


def test_train_without_test_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", [row(1), row(2)])
    with pytest.raises(CorpusError, match="has train/ but no test/"):
        loaded(tmp_path)


def test_holding_out_splits_each_task(tmp_path: Path) -> None:
    write(tmp_path / "big.jsonl", [row(number) for number in range(50)])
    write(tmp_path / "small.jsonl", [row(1), row(2)])
    corpus = loaded(tmp_path, holdout=0.1)
    assert {task: len(rows) for task, rows in corpus.test.items()} == {"big": 5, "small": 1}
    assert {task: len(rows) for task, rows in corpus.train.items()} == {"big": 45, "small": 1}
    assert asked(loaded(tmp_path / "big.jsonl"), "big") == asked(corpus, "big")


def test_validation_rows_are_neither_trained_nor_held_out(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [row(number) for number in range(100)])
    plain, corpus = loaded(tmp_path), loaded(tmp_path, validation=0.1)
    assert asked(plain) == asked(corpus)
    parts = [corpus.train["t"], corpus.validation["t"], corpus.test["t"]]
    assert [len(part) for part in parts] == [81, 9, 10]
    assert len({item.source for part in parts for item in part}) == 100


def test_held_out_rows_depend_on_content_and_seed_and_not_on_order(tmp_path: Path) -> None:
    rows = [row(number) for number in range(60)]
    file = write(tmp_path / "t.jsonl", rows)
    first = asked(loaded(file))
    assert asked(loaded(file)) == first
    assert asked(loaded(file, seed=1)) != first
    assert asked(loaded(write(file, rows[::-1]))) == first


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [row(1), row(2)])
    assert sum(map(len, (loaded(file).train["t"], loaded(file).test["t"]))) == 2
    write(file, [row(1), row(2), row(3)])
    assert sum(map(len, (loaded(file).train["t"], loaded(file).test["t"]))) == 3


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1])
def test_a_holdout_out_of_range_is_an_error(tmp_path: Path, holdout: float) -> None:
    file = write(tmp_path / "t.jsonl", [row(1), row(2)])
    with pytest.raises(CorpusError, match="no share of the rows"):
        loaded(file, holdout=holdout)


def test_a_task_that_cannot_be_split_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [row(1)])
    with pytest.raises(CorpusError, match="has one row"):
        loaded(file)
    with pytest.raises(CorpusError, match="all ask the same"):
        loaded(write(file, [row(1), row(1, output="3")]))


def test_bad_rows_refuse_the_data_unless_they_are_to_be_skipped(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [row(1), row(2), {"instruction": "a"}, row(3, output="")])
    with pytest.raises(CorpusError) as caught:
        loaded(file)
    said = str(caught.value)
    assert said.startswith("2 rows cannot be used:")
    assert f"{file}:3" in said and f"{file}:4" in said and "on_bad_row=skip" in said
    corpus = loaded(file, skip_bad_rows=True)
    assert corpus.skipped == 2
    assert len(corpus.train["t"]) + len(corpus.test["t"]) == 2
    assert str(corpus.skipped_shown[0]).startswith(f"{file}:3")


def test_several_files_and_named_tasks(tmp_path: Path) -> None:
    one = write(tmp_path / "x" / "one.jsonl", [row(1), row(2)])
    two = write(tmp_path / "y" / "two.jsonl", [row(1), row(2)])
    assert loaded([str(one), str(two)]).tasks == ["one", "two"]
    assert loaded({"a": str(one), "b": str(two)}).tasks == ["a", "b"]
    again = write(tmp_path / "z" / "one.jsonl", [row(5), row(6)])
    with pytest.raises(CorpusError, match=r"task 'one' is in .*data: \{TASK: PATH"):
        loaded([str(one), str(again)])


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "x" / "one.jsonl", [row(1), row(2)])
    two = write(tmp_path / "x" / "two.jsonl", [row(3), row(4)])
    for again in (
        [one, one],
        [one, two, tmp_path / "x" / ".." / "x" / "one.jsonl"],
        [two.parent] * 2,
    ):
        with pytest.raises(CorpusError, match=r"one.jsonl is given twice"):
            loaded([str(path) for path in again])


def test_data_that_name_nothing_are_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one.jsonl", [row(1), row(2)])
    monkeypatch.chdir(tmp_path)
    nothing: tuple[Any, ...] = ("", " ", [], {}, [""], {"a": ""})
    for data in nothing:
        with pytest.raises(CorpusError, match="data is empty"):
            loaded(data)
    assert loaded(".").tasks == ["one"]


texts = st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "e"]), min_size=2, max_size=30)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.floats(0.01, 0.99), st.integers(0, 5))
def test_duplicates_never_straddle_the_split_and_no_row_is_lost(
    tmp_path: Path, texts: list[str], share: float, seed: int
) -> None:
    if len({text.strip().lower() for text in texts}) < 2:
        return
    found = [example(1, text=text) for text in texts]
    for number, item in enumerate(found):
        object.__setattr__(item, "source", str(number))
    store = open_store(texts, lambda: found, tmp_path, lambda rows: None)
    rest, apart = split("t", Rows(store, store.rows_of("t")), share, str(seed))
    assert len(rest) and len(apart)
    assert sorted(int(item.source) for item in [*rest, *apart]) == list(range(len(texts)))
    assert not set(rest.keys.tolist()) & set(apart.keys.tolist())
    sizes = {key: rest.keys.tolist().count(key) for key in set(rest.keys.tolist())}
    wanted = min(max(1, round(share * len(texts))), len(texts) - 1)
    # As near to the share as whole groups allow: no group left over would still have fitted.
    assert len(apart) <= wanted or len(set(apart.keys.tolist())) == 1
    assert all(len(apart) + size > wanted for size in sizes.values()) or len(sizes) == 1


def test_the_bundled_samples_are_five_disjoint_tasks() -> None:
    corpus = loaded("samples")
    assert corpus.tasks == [
        "code_bash",
        "intent_banking_a",
        "intent_banking_b",
        "legal_cuad",
        "legal_overruling",
    ]
    for task in corpus.tasks:
        train = {str(item.prompt) for item in corpus.train[task]}
        test = {str(item.prompt) for item in corpus.test[task]}
        assert len(train) >= 184 and len(test) >= 33 and not train & test
    assert sum(file.stat().st_size for file in samples_path().rglob("*.jsonl")) < 700_000
