"""A part of what benchmarks/fuzz.py does: random and damaged inputs into readers and recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz_check
from fuzz_check import ViolationError, check
from fuzzing import READERS, Case, make_case
from fuzzing_recipes import check_recipe, make_recipe_case
from manylora.corpus.layouts import CorpusError, Example
from manylora.corpus.readers import read_examples

INPUTS = 300


@pytest.mark.parametrize("reader", READERS)
def test_any_input_gives_right_rows_or_an_error_to_act_on(reader: str, tmp_path: Path) -> None:
    outcomes = {check(make_case(reader, number), tmp_path) for number in range(INPUTS)}
    assert outcomes == {"right", "partly", "refused"}


def test_any_recipe_is_read_or_refused(tmp_path: Path) -> None:
    outcomes = {check_recipe(make_recipe_case(number), tmp_path) for number in range(INPUTS)}
    assert outcomes == {"right", "refused"}


def lost_row(path: Path) -> list[Example | CorpusError]:
    return []


def leak(path: Path) -> list[Example | CorpusError]:
    raise KeyError("output")


def nameless(path: Path) -> list[Example | CorpusError]:
    raise CorpusError("cannot be read")


def greedy(path: Path) -> list[Example | CorpusError]:
    return [CorpusError(f"{path}: {len(bytearray(2**28))}")]


def endless(path: Path) -> list[Example | CorpusError]:
    while True:
        pass


WRONG = {lost_row: "0 rows came out", leak: "KeyError", nameless: "not begin with the file"}
WRONG |= {greedy: "MiB for a file of", endless: "no end within"}


@pytest.mark.parametrize("reader", WRONG)
def test_the_check_itself_finds_what_is_wrong(
    reader: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_check, "read_examples", reader)
    monkeypatch.setattr(fuzz_check, "SECONDS", 1.5)
    case = Case("rows.jsonl", b'{"prompt": "a", "output": "b"}\n', 31, None)
    with pytest.raises(ViolationError, match=WRONG[reader]):  # type: ignore[index]
        check(case, tmp_path)


def outcome(path: Path) -> list[object]:
    """What comes out; of a file that is refused in the end, that alone."""
    found: list[object] = []
    try:
        for item in read_examples(path):
            found.append(item if isinstance(item, Example) else "bad")
    except CorpusError:
        return ["refused"]
    return found


def test_json_does_not_depend_on_where_its_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(INPUTS):
        case = make_case("json", number)
        path = tmp_path / case.name
        path.write_bytes(case.content[:5000])
        whole = outcome(path)
        for size in (1, 7):
            monkeypatch.setattr("manylora.corpus.json_rows._CHUNK", size)
            assert outcome(path) == whole, number
        monkeypatch.undo()
