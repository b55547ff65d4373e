"""Small files in the layout of the benchmarks, and the same rows as the hub's data sets have them.

`write_bench` writes the files; `hub_rows` are written by hand from the hub's columns, so that what
reads the files can be compared with them.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SUPER_GLUE = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "sglue_rte": "RTE", "wsc": "WSC"}


def mmlu(i: int) -> tuple[Row, Row]:
    question, choices = (
        f' What is {i} + {i}, "really"?\nThink. ',
        [f"{2 * i + k}, N/A" for k in range(4)],
    )
    cells = {f"choice{k}": choices[k] for k in range(4)}
    return (
        {"question": question, **cells, "answer": str(i % 4)},
        {"question": question, "choices": choices, "answer": i % 4},
    )


def gsm8k(i: int) -> tuple[Row, Row]:
    row = {"question": f"{i} apples?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i % 10}"}
    return row, row


def bbh(i: int) -> tuple[Row, Row]:
    row = {"input": f"Do you return after {i} steps?", "target": "No" if i % 2 else "Yes"}
    return row, row


def humaneval(i: int) -> tuple[Row, Row]:
    row = {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def add{i}(x):\n    """ Add {i}. """\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
        "entry_point": f"add{i}",
    }
    return row, row


def boolq(i: int) -> tuple[Row, Row]:
    row = {"question": f"is {i} even", "passage": f"{i} -- A number."}
    return {**row, "label": i % 2 == 0, "idx": i}, {**row, "label": int(i % 2 == 0)}


def cb(i: int) -> tuple[Row, Row]:
    row = {"premise": f"He said {i}.", "hypothesis": f"it is {i}"}
    label = ["entailment", "contradiction", "neutral"][i % 3]
    return {**row, "label": label, "idx": i}, {**row, "label": i % 3}


def copa(i: int) -> tuple[Row, Row]:
    row = {
        "premise": f"Man {i} fell.",
        "choice1": "He slipped.",
        "choice2": "He sang.",
        "question": "effect" if i % 2 else "cause",
        "label": i // 2 % 2,
    }
    return {**row, "idx": i}, row


def sglue_rte(i: int) -> tuple[Row, Row]:
    row = {"premise": f"{i} men sat.", "hypothesis": f"{i} men stood."}
    label = "not_entailment" if i % 2 else "entailment"
    return {**row, "label": label, "idx": i}, {**row, "label": i % 2}


def wsc(i: int) -> tuple[Row, Row]:
    text = f"The ball {i} hit the table because it was soft ."
    spans = {"span1_index": 4, "span2_index": 7, "span2_text": "it"}
    return (
        {
            "text": text,
            "target": {**spans, "span1_text": "The table"},
            "label": i % 2 == 1,
            "idx": i,
        },
        {"text": text, **spans, "span1_text": "the table", "label": i % 2},
    )


def multirc(i: int) -> tuple[Row, list[Row]]:
    answers = [{"text": "a 'b'", "idx": 0, "label": i % 2}, {"text": "c", "idx": 1, "label": 1}]
    questions = [{"question": f"Who came {i}th?", "answers": answers, "idx": 0}]
    hub = [
        {
            "paragraph": f"Text {i}.",
            "question": f"Who came {i}th?",
            "answer": answer["text"],
            "idx": {"paragraph": i, "question": 0, "answer": a},
            "label": answer["label"],
        }
        for a, answer in enumerate(answers)
    ]
    return {"idx": i, "passage": {"text": f"Text {i}.", "questions": questions}}, hub


MAKERS = {
    "boolq": boolq, "cb": cb, "copa": copa, "sglue_rte": sglue_rte, "wsc": wsc,
    "gsm8k_cot": gsm8k, "humaneval": humaneval,
}  # fmt: skip


def hub_rows(task: str, count: int) -> list[Row]:
    if task == "multirc":
        return [row for i in range(count) for row in multirc(i)[1]]
    make = mmlu if task.startswith("mmlu") else bbh if task.startswith("bbh") else MAKERS[task]
    return [make(i)[1] for i in range(count)]


def write_bench(folder: Path, count: int, subjects: list[str], bbh_tasks: list[str]) -> Path:
    """Every benchmark, `count` rows a file; mmlu with 5 dev rows."""
    for subject in subjects:
        write_csv(folder / f"mmlu/test/{subject}_test.csv", [mmlu(i)[0] for i in range(count)])
        write_csv(folder / f"mmlu/dev/{subject}_dev.csv", [mmlu(i)[0] for i in range(90, 95)])
    for name in bbh_tasks:
        path = folder / f"bbh/bbh/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = [bbh(i)[0] for i in range(count)]
        path.write_text(json.dumps({"canary": "x", "examples": examples}), encoding="utf-8")
    for task, name in SUPER_GLUE.items():
        rows = [MAKERS[task](i)[0] for i in range(count)]
        write_jsonl(folder / f"superglue/{name}/val.jsonl", rows)
    write_jsonl(folder / "superglue/MultiRC/val.jsonl", [multirc(i)[0] for i in range(count)])
    write_jsonl(folder / "gsm8k/test.jsonl", [gsm8k(i)[0] for i in range(count)])
    path = folder / "humaneval/HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(humaneval(i)[0]) + "\n" for i in range(min(count, 12)))
    return folder


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
