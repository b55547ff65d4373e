"""Tests of code that rows carry: which columns hold them, and that they reach the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora.corpus import DataOptions, Example, Fields, load_corpus, read_examples
from manylora.corpus.readers import columns_not_read

ASK = {"instruction": "Double x.", "output": "def f(x):\n    return 2 * x"}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"tests": "assert f(1) == 2"}, "assert f(1) == 2"),
    "list": ({"Tests": ["assert f(1) == 2", "assert f(0) == 0"]},
             "assert f(1) == 2\nassert f(0) == 0"),
    "list as text": ({"tests": '["assert f(1) == 2", "assert f(0) == 0"]'},
                     "assert f(1) == 2\nassert f(0) == 0"),
    "mbpp": ({"test_list": ["assert f(1) == y"], "test_setup_code": "y = 2",
              "test_imports": ["import math"]}, "import math\ny = 2\nassert f(1) == y"),
    "humaneval": ({"test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"},
                  "def check(f):\n    assert f(1) == 2\ncheck(f)"),
    "unittest": ({"tests": "case.assertEqual(f(1), 2)"}, "case.assertEqual(f(1), 2)"),
}  # fmt: skip
NONE: dict[str, dict[str, Any]] = {
    "prose": {"tests": "blood count"},
    "python that asserts nothing": {"tests": "f(1)"},
    "an assertion in a string": {"tests": "'assert f(1) == 2'"},
    "inputs and outputs": {"tests": [{"input": "1", "output": "2"}]},
    "a number": {"tests": 3},
    "nothing": {"tests": None},
    "half a surrogate pair": {"tests": "assert '\ud800'"},
    "test without entry_point": {"test": "assert f(1) == 2"},
}


def read(path: Path, fields: Fields | None = None) -> list[Example]:
    found = list(read_examples(path, fields))
    assert all(isinstance(item, Example) for item in found), found
    return [item for item in found if isinstance(item, Example)]


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_tests_are_kept_beside_the_conversation(form: str, tmp_path: Path) -> None:
    columns, expected = FORMS[form]
    with_tests, without = read(jsonl(tmp_path / "a.jsonl", {**ASK, **columns}, ASK))
    assert with_tests.tests == expected
    assert without.tests == ""
    assert with_tests.messages == without.messages
    assert columns_not_read(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_test_is_left_out_and_named_as_not_read(form: str, tmp_path: Path) -> None:
    (only,) = read(jsonl(tmp_path / "a.jsonl", {**ASK, **NONE[form]}))
    assert only.tests == ""
    assert only.messages == [
        {"role": "user", "content": ASK["instruction"]},
        {"role": "assistant", "content": ASK["output"]},
    ]
    assert columns_not_read(tmp_path / "a.jsonl") == list(NONE[form])


def test_a_recipe_that_names_mbpps_columns_keeps_its_tests(tmp_path: Path) -> None:
    row = {"text": "Double x.", "code": ASK["output"], "test_list": ["assert f(1) == 2"]}
    fields = Fields(prompt="text", output="code")
    (one,) = read(jsonl(tmp_path / "a.jsonl", row), fields)
    assert one.tests == "assert f(1) == 2"
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert [item.tests for item in read(tmp_path / "a.parquet", fields)] == [one.tests]


def test_tests_that_are_the_answer_to_learn_are_not_kept_as_tests(tmp_path: Path) -> None:
    row = {"prompt": "Write tests.", "tests": "assert f(1) == 2"}
    fields = Fields(prompt="prompt", output="tests")
    (one,) = read(jsonl(tmp_path / "a.jsonl", row), fields)
    assert (one.output, one.tests) == ("assert f(1) == 2", "")


def test_tests_survive_the_store_and_change_nothing_that_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    rows = [{**ASK, "instruction": f"Double {i}."} for i in range(10)]
    tests = [{"tests": f"assert f({i}) == {2 * i}"} for i in range(10)]
    plain = load_corpus(jsonl(tmp_path / "a.jsonl", *rows), DataOptions(holdout=0.3))
    jsonl(tmp_path / "a.jsonl", *({**row, **own} for row, own in zip(rows, tests, strict=True)))
    for _ in range(2):  # from the file, then from the cache
        corpus = load_corpus(tmp_path / "a.jsonl", DataOptions(holdout=0.3))
        assert corpus.content == plain.content
        for held, before in zip(corpus.test["a"], plain.test["a"], strict=True):
            assert held.messages == before.messages
            assert before.tests == ""
            number = int(held.prompt[0]["content"][7:-1])
            assert held.tests == f"assert f({number}) == {2 * number}"
