"""Rows of benchmark files, in the columns of the hub data sets that lm-eval's tasks read.

One function a benchmark; each takes a row as the file has it and returns the rows that it makes.
A row without what the benchmark needs is a CorpusError that names the file and the row.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manylora.corpus import CorpusError

Row = dict[str, Any]
Convert = Callable[[Row, str], list[Row]]

CB_LABELS = ["entailment", "contradiction", "neutral"]
RTE_LABELS = ["entailment", "not_entailment"]


def read_rows(path: Path, convert: Convert) -> list[Row]:
    """The converted rows of a .jsonl, .jsonl.gz, .csv or .json file, in file order."""
    if not path.is_file():
        raise CorpusError(
            f"{path}: no such file. The folder of benchmark files must have it under this name."
        )
    try:
        found = [row for where, raw in _raw(path) for row in convert(raw, where)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}).") from error
    if not found:
        raise CorpusError(f"{path}: the file has no rows.")
    return found


def _raw(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row as it is written, and where it stands."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield f"{path}, row {number}", row
    elif path.suffix == ".json":
        whole = _parsed(path.read_text(encoding="utf-8"), str(path))
        examples = _fields(whole, str(path), examples=list)["examples"]
        for number, row in enumerate(examples, 1):
            yield f"{path}, row {number}", _object(row, f"{path}, row {number}")
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, row {number}"
                yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Row:
    try:
        return _object(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error}).") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: expected an object, got {type(value).__name__}.")
    return value


def _fields(row: Row, where: str, **wanted: type) -> Row:
    """The wanted fields alone; each must be there and of its type."""
    for name, kind in wanted.items():
        if name not in row:
            given = ", ".join(str(key) for key in row)
            raise CorpusError(f"{where}: no field {name!r}; the row has {given}.")
        if type(row[name]) is not kind:
            raise CorpusError(
                f"{where}: {name!r} is {row[name]!r}; expected a value of type {kind.__name__}."
            )
    return {name: row[name] for name in wanted}


def _label(row: Row, where: str, labels: list[str]) -> int:
    text = _fields(row, where, label=str)["label"]
    if text not in labels:
        raise CorpusError(f"{where}: the label is {text!r}; expected {' or '.join(labels)}.")
    return labels.index(text)


def mmlu(row: Row, where: str) -> list[Row]:
    """cais/mmlu: question, choices, answer (0 to 3)."""
    names = [f"choice{i}" for i in range(4)]
    fields = _fields(row, where, question=str, answer=str, **dict.fromkeys(names, str))
    if None in row or fields["answer"] not in ("0", "1", "2", "3"):
        raise CorpusError(
            f"{where}: expected question, choice0 to choice3 and an answer from 0 to 3, "
            f"got answer={fields['answer']!r} and {len(row.get(None, []))} cells too many."  # type: ignore[call-overload]
        )
    choices = [fields[name] for name in names]
    return [{"question": fields["question"], "choices": choices, "answer": int(fields["answer"])}]


def gsm8k(row: Row, where: str) -> list[Row]:
    """openai/gsm8k: question, answer (reasoning, then #### and the number)."""
    fields = _fields(row, where, question=str, answer=str)
    if "####" not in fields["answer"]:
        raise CorpusError(f"{where}: the answer has no line '#### NUMBER'.")
    return [fields]


def bbh(row: Row, where: str) -> list[Row]:
    """SaylorTwift/bbh: input, target."""
    return [_fields(row, where, input=str, target=str)]


def humaneval(row: Row, where: str) -> list[Row]:
    """openai/openai_humaneval."""
    names = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return [_fields(row, where, **dict.fromkeys(names, str))]


def boolq(row: Row, where: str) -> list[Row]:
    """super_glue, boolq: label 0 is no, 1 yes."""
    fields = _fields(row, where, question=str, passage=str, label=bool)
    return [{**fields, "label": int(fields["label"])}]


def cb(row: Row, where: str) -> list[Row]:
    """super_glue, cb: label is a place in CB_LABELS."""
    fields = _fields(row, where, premise=str, hypothesis=str)
    return [{**fields, "label": _label(row, where, CB_LABELS)}]


def copa(row: Row, where: str) -> list[Row]:
    """super_glue, copa: label 0 is choice1, 1 choice2."""
    fields = _fields(row, where, premise=str, choice1=str, choice2=str, question=str, label=int)
    if fields["label"] not in (0, 1) or fields["question"] not in ("cause", "effect"):
        raise CorpusError(
            f"{where}: expected label 0 or 1 and question cause or effect, got "
            f"{fields['label']} and {fields['question']!r}."
        )
    return [fields]


def rte(row: Row, where: str) -> list[Row]:
    """super_glue, rte: label is a place in RTE_LABELS."""
    fields = _fields(row, where, premise=str, hypothesis=str)
    return [{**fields, "label": _label(row, where, RTE_LABELS)}]


def wsc(row: Row, where: str) -> list[Row]:
    """super_glue, wsc.fixed: spans written as they stand in the text; label 0 is no, 1 yes."""
    fields = _fields(row, where, text=str, target=dict, label=bool)
    spans = {"span1_text": str, "span1_index": int, "span2_text": str, "span2_index": int}
    target = _fields(fields["target"], f"{where}, target", **spans)
    text, words = fields["text"], fields["text"].split()
    for span in ("span1", "span2"):
        if not 0 <= target[f"{span}_index"] < len(words):
            raise CorpusError(f"{where}: {span}_index is outside the text's {len(words)} words.")
        target[f"{span}_text"] = _as_written(
            target[f"{span}_text"], text, words[target[f"{span}_index"]]
        )
    return [{"text": text, **target, "label": int(fields["label"])}]


def _as_written(span: str, text: str, first_word: str) -> str:
    """What makes wsc.fixed of wsc on the hub: the case of the text, no full stop, no line ends."""
    if span in text or not span:
        return span
    first = span[0].lower() if first_word[0].islower() else span[0].upper()
    fixed = (first + span[1:]).rstrip(".").replace("\n", " ")
    return fixed if fixed in text else span


def multirc(row: Row, where: str) -> list[Row]:
    """super_glue, multirc: a row for each answer; label 1 is a right one."""
    whole = _fields(row, where, passage=dict, idx=int)
    passage = _fields(whole["passage"], f"{where}, passage", text=str, questions=list)
    found = []
    for q, raw_question in enumerate(passage["questions"]):
        place = f"{where}, question {q}"
        question = _fields(_object(raw_question, place), place, question=str, answers=list)
        for a, raw_answer in enumerate(question["answers"]):
            spot = f"{place}, answer {a}"
            answer = _fields(_object(raw_answer, spot), spot, text=str, label=int)
            if answer["label"] not in (0, 1):
                raise CorpusError(f"{spot}: the label is {answer['label']}; expected 0 or 1.")
            found.append(
                {
                    "paragraph": passage["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "idx": {"paragraph": whole["idx"], "question": q, "answer": a},
                    "label": answer["label"],
                }
            )
    return found
