"""The rows of examples/multilora_mixture.yaml, from the data sets' own files.

    pip install 'manylora[eval]'
    python examples/multilora_data.py data data/multilora

Read below DATA:

    official_train/superglue_{BoolQ,CB,COPA,MultiRC}_train_olora.json   a list of {label, sentence}
    official_train/superglue_{RTE,WSC}_train.jsonl, gsm8k_train.jsonl   the official rows
    multitask/{train,test}/qa_{arc,obqa}.jsonl, multitask/test/instr_dolly.jsonl
    instruct/dolly15k.jsonl.gz
    bench/superglue/{BoolQ,CB,COPA,MultiRC,RTE,WSC}/val.jsonl, bench/gsm8k/test.jsonl

Written are OUT/train/TASK.jsonl and OUT/test/TASK.jsonl with instruction, input and output. A task
of SuperGLUE, and GSM8K, is worded by lm-eval's task of the same name, so that `manylora eval` asks
what was trained; ARC and OpenBookQA are worded as lm-eval words MMLU. Training rows that ask what
a held-out row asks are left out. Do not pass OUT on: MultiRC is for research alone, RTE and CB
name no licence, and Dolly, BoolQ and ARC are share-alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

from manylora.corpus import CorpusError
from manylora.evaluate.harness import rows
from manylora.evaluate.harness.offline import load_tasks

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]

OFFICIAL = {
    "sglue_rte": ("superglue_RTE_train.jsonl", rows.rte),
    "wsc": ("superglue_WSC_train.jsonl", rows.wsc),
    "gsm8k": ("gsm8k_train.jsonl", rows.gsm8k),
}
"""By lm-eval's name: training rows as the data set's authors wrote them, and what reads them."""

OLORA = {
    "boolq": ("BoolQ", r"question: (?P<question>.*)\npassage: (?P<passage>.*)", ["False", "True"]),
    "cb": ("CB", r"sentence 1: (?P<premise>.*)\nsentence 2: (?P<hypothesis>.*)", rows.CB_LABELS),
    "copa": (
        "COPA",
        r'Which sentence is the (?P<question>cause|effect) of "(?P<premise>.*)"\? '
        r"Choose one between A and B\.\nA: (?P<choice1>.*)\nB: (?P<choice2>.*)",
        ["A", "B"],
    ),
    "multirc": (
        "MultiRC",
        r"paragraph: (?P<paragraph>.*)\nquestion: (?P<question>.*)\n"
        r"candidate answer: (?P<answer>.*)",
        ["False", "True"],
    ),
}
"""The same of O-LoRA's copies: the name in the file's, the columns in one text, the labels."""

CALCULATOR = re.compile(r"<<[^<>]*>>")


def mixture(data: Path) -> dict[str, Split]:
    """The (training rows, held-out rows) of each task.

    Raises CorpusError, naming file and row, for one that is not in its data set's form.
    """
    tasks = load_tasks([*OLORA, *OFFICIAL], data / "bench", allow_code=False).tasks
    found = {name: _benchmark(task, _training(name, data)) for name, task in tasks.items()}
    for name, file in (("arc", "qa_arc.jsonl"), ("openbookqa", "qa_obqa.jsonl")):
        train, test = (data / "multitask" / split / file for split in ("train", "test"))
        found[name] = (rows.read_rows(train, choice), rows.read_rows(test, choice))
    found["dolly"] = (
        rows.read_rows(data / "instruct/dolly15k.jsonl.gz", dolly),
        rows.read_rows(data / "multitask/test/instr_dolly.jsonl", instruction),
    )
    return found


def _training(name: str, data: Path) -> list[Row]:
    folder = data / "official_train"
    if name in OLORA:
        return olora_rows(name, folder / f"superglue_{OLORA[name][0]}_train_olora.json")
    file, convert = OFFICIAL[name]
    return rows.read_rows(folder / file, convert)


def olora_rows(name: str, path: Path) -> list[Row]:
    """Rows of an O-LoRA file, in the columns of lm-eval's task `name`."""
    _, form, labels = OLORA[name]
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path}: not JSON ({error}).") from error
    if not isinstance(raw, list):
        raise CorpusError(f"{path}: expected a list of rows, got {type(raw).__name__}.")
    found = []
    for number, row in enumerate(raw, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: expected an object, got {type(row).__name__}.")
        label, sentence = _texts(row, where, "label", "sentence")
        match = re.fullmatch(form, sentence, re.DOTALL)
        if match is None:
            raise CorpusError(f"{where}: the sentence is {sentence[:80]!r}; expected {form}")
        if label not in labels:
            raise CorpusError(f"{where}: the label is {label!r}; expected {' or '.join(labels)}.")
        found.append({**match.groupdict(), "label": labels.index(label)})
    return found


def _benchmark(task: Any, train: list[Row]) -> Split:
    return [worded(task, doc) for doc in train], [worded(task, doc) for doc in task.eval_docs]


def worded(task: Any, doc: Row) -> Row:
    """A row as lm-eval's task asks it, with the answer that the task takes for right."""
    prompt, name = task.doc_to_text(doc), task.config.task
    if name == "gsm8k":  # its calculator's marks are no part of what a model is to write
        return {"instruction": prompt, "input": "", "output": CALCULATOR.sub("", doc["answer"])}
    answer = task.doc_to_choice(doc)[doc["label"]].strip()
    if name == "multirc":  # lm-eval ranks "ANSWER\nIs the answer correct? yes" against "... no"
        candidate, _, answer = answer.rpartition(" ")
        prompt = f"{prompt} {candidate}"
    return {"instruction": prompt, "input": "", "output": answer}


def choice(row: Row, where: str) -> list[Row]:
    """A question whose input ends with lines "A. TEXT", in MMLU's words; the answer is a letter."""
    question, answer = _texts(row, where, "input", "output")
    if not re.match(r"[A-Z]\. ", answer) or answer not in question.splitlines()[1:]:
        raise CorpusError(f"{where}: the answer {answer!r} is no line of the input.")
    return [{"instruction": f"{question}\nAnswer:", "input": "", "output": answer[0]}]


def dolly(row: Row, where: str) -> list[Row]:
    """A row of databricks-dolly-15k."""
    names = _texts(row, where, "instruction", "context", "response")
    return [dict(zip(("instruction", "input", "output"), names, strict=True))]


def instruction(row: Row, where: str) -> list[Row]:
    """A row that is in the form already."""
    names = ("instruction", "input", "output")
    return [dict(zip(names, _texts(row, where, *names), strict=True))]


def _texts(row: Row, where: str, *names: str) -> list[str]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise CorpusError(
                f"{where}: expected a text {name!r}, got {row.get(name)!r}; the row has "
                f"{', '.join(row)}."
            )
    return [row[name] for name in names]


def asked(row: Row) -> str:
    """What a row asks, but for case and spacing."""
    return " ".join(f"{row['instruction']} {row['input']}".casefold().split())


def write(path: Path, found: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets' files")
    parser.add_argument("out", type=Path, help="the folder to write")
    given = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has several lines to say of each task
    try:
        found = mixture(given.data)
    except (CorpusError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    for name, (train, test) in found.items():
        held = {asked(row) for row in test}
        kept = [row for row in train if asked(row) not in held]
        # Scores are of the first rows, and MultiRC's file begins with many of few paragraphs.
        random.Random(0).shuffle(test)
        write(given.out / "train" / f"{name}.jsonl", kept)
        write(given.out / "test" / f"{name}.jsonl", test)
        print(
            f"{name}: {len(kept):,} rows to train on, {len(test):,} held out; "
            f"{len(train) - len(kept):,} left out, asked by a held-out row"
        )


if __name__ == "__main__":
    main()
