"""Task files: what is read, what is refused, and how rows are held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.corpus import Corpus, CorpusError, Example, load_corpus, read_tasks, samples_path
from manylora.corpus.formats import _split


def row(number: int, **changes: object) -> dict[str, object]:
    return {"instruction": "Add one.", "input": str(number), "output": str(number + 1)} | changes


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def examples(inputs: list[str]) -> list[Example]:
    return [
        Example("t", "Say it.", text, "yes", f"t.jsonl:{number}")
        for number, text in enumerate(inputs, start=1)
    ]


def test_a_prompt_is_the_instruction_then_the_input() -> None:
    assert Example("t", "Do it.", "now", "ok", "t.jsonl:1").prompt == "Do it.\nnow"
    assert Example("t", "Do it.", "", "ok", "t.jsonl:1").prompt == "Do it."


def test_the_file_name_is_the_task_whatever_the_row_calls_it(tmp_path: Path) -> None:
    file = write(tmp_path / "maths.jsonl", [row(1, task="sums"), row(2)])
    read = read_tasks(file)
    assert list(read) == ["maths"]
    assert [(item.task, item.source) for item in read["maths"]] == [
        ("maths", "maths.jsonl:1"),
        ("maths", "maths.jsonl:2"),
    ]


def test_input_may_be_absent_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('\n{"instruction": "a", "output": "b"}\n\n', encoding="utf-8")
    (only,) = read_tasks(file)["t"]
    assert (only.input, only.source) == ("", "t.jsonl:2")


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    line = '{"instruction": " a\u2028b ", "output": "\\u00e9\\n"}'
    file.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    (only,) = read_tasks(file)["t"]
    assert (only.instruction, only.output) == (" a\u2028b ", "é\n")


def test_a_folder_is_read_in_the_order_of_task_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", [row(1)])
    (tmp_path / "manifest.json").write_text("[]")
    assert list(read_tasks(tmp_path)) == ["a", "b", "c"]


BAD_LINES = {
    b"{oops": "not JSON",
    b"[1, 2]": "a JSON list, not an object",
    b'{"instruction": "a", "text": "b"}': "the row has 'instruction', 'text'",
    b"{}": "the row has no field",
    b'{"instruction": "a", "output": ""}': 'field "output" is empty',
    b'{"instruction": " \\n", "output": "b"}': 'field "instruction" is empty',
    b'{"instruction": "a", "output": 3}': 'field "output" is 3, not a string',
    b'{"instruction": "a", "input": null, "output": "b"}': "in quotes or leave it out",
    b'{"instruction": "a", "output": "\\ud800"}': "half of a surrogate pair",
    b'{"instruction": "caf\xe9", "output": "b"}': "not UTF-8 text: byte 0xe9 at position 20",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_an_error_that_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"instruction": "a", "output": "b"}\n' + line + b"\n")
    with pytest.raises(CorpusError) as caught:
        read_tasks(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert BAD_LINES[line] in str(caught.value)


def test_paths_without_tasks_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"no \*.jsonl file here, found nothing"):
        read_tasks(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(CorpusError, match=r"found rows\.csv"):
        read_tasks(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match=r"empty\.jsonl: holds no row"):
        read_tasks(tmp_path)


def test_two_files_of_one_task_name_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", [row(1)])
    write(tmp_path / "sums.JSONL", [row(2)])
    with pytest.raises(CorpusError, match="the same task name as"):
        read_tasks(tmp_path)


def test_given_train_and_test_folders_are_kept(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / "train" / f"{name}.jsonl", [row(1), row(2)])
    write(tmp_path / "test" / "a.jsonl", [row(3)])
    corpus = load_corpus(tmp_path)
    assert corpus.tasks == ["a", "b"]
    assert len(corpus.train["a"]) == 2
    assert [item.input for item in corpus.test["a"]] == ["3"]
    assert "b" not in corpus.test


def test_a_test_task_that_is_not_trained_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", [row(1)])
    write(tmp_path / "test" / "z.jsonl", [row(1)])
    with pytest.raises(CorpusError, match=r"no task 'z' in .*train, which has a"):
        load_corpus(tmp_path)


def test_train_without_test_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", [row(1), row(2)])
    with pytest.raises(CorpusError, match="has train/ but no test/"):
        load_corpus(tmp_path)


def test_holding_out_splits_each_task_of_a_flat_folder(tmp_path: Path) -> None:
    write(tmp_path / "big.jsonl", [row(number) for number in range(50)])
    write(tmp_path / "small.jsonl", [row(1), row(2)])
    corpus = load_corpus(tmp_path, holdout=0.1)
    assert {task: len(rows) for task, rows in corpus.test.items()} == {"big": 5, "small": 1}
    assert {task: len(rows) for task, rows in corpus.train.items()} == {"big": 45, "small": 1}
    assert load_corpus(tmp_path / "big.jsonl", holdout=0.1).test["big"] == corpus.test["big"]


def inputs(corpus: Corpus) -> set[str]:
    return {item.input for item in corpus.test["t"]}


def test_held_out_rows_depend_on_content_and_seed_and_not_on_order(tmp_path: Path) -> None:
    rows = [row(number) for number in range(60)]
    file = write(tmp_path / "t.jsonl", rows)
    first = inputs(load_corpus(file))
    assert inputs(load_corpus(file)) == first
    assert inputs(load_corpus(file, seed=1)) != first
    assert inputs(load_corpus(write(file, rows[::-1]))) == first


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1])
def test_a_holdout_out_of_range_is_an_error(tmp_path: Path, holdout: float) -> None:
    file = write(tmp_path / "t.jsonl", [row(1), row(2)])
    with pytest.raises(CorpusError, match="holdout="):
        load_corpus(file, holdout=holdout)


def test_a_task_that_cannot_be_split_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [row(1)])
    with pytest.raises(CorpusError, match="has one row"):
        load_corpus(file)
    with pytest.raises(CorpusError, match="the same instruction and input"):
        load_corpus(write(file, [row(1), row(1, output="3")]))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "e"]), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_duplicates_never_straddle_the_split_and_no_row_is_lost(
    texts: list[str], holdout: float, seed: int
) -> None:
    alike = {text.strip().lower() for text in texts}
    if len(alike) < 2:
        return
    train, test = _split("t", examples(texts), holdout, seed)
    assert train and test
    assert sorted(item.source for item in train + test) == sorted(
        item.source for item in examples(texts)
    )
    assert not {item.input.strip().lower() for item in train} & {
        item.input.strip().lower() for item in test
    }


def test_the_bundled_samples_are_five_disjoint_tasks() -> None:
    corpus = load_corpus(samples_path())
    assert corpus.tasks == [
        "code_bash",
        "intent_banking_a",
        "intent_banking_b",
        "legal_cuad",
        "legal_overruling",
    ]
    for task in corpus.tasks:
        train = {item.prompt for item in corpus.train[task]}
        test = {item.prompt for item in corpus.test[task]}
        assert len(train) >= 184 and len(test) >= 33 and not train & test
    assert sum(file.stat().st_size for file in samples_path().rglob("*.jsonl")) < 700_000
