"""Draw the bundled sample tasks from a folder of the full tasks.

    python benchmarks/make_samples.py MULTITASK_FOLDER

MULTITASK_FOLDER has train/TASK.jsonl and test/TASK.jsonl. Train rows come from train/, test rows
from test/. Rows are taken in the order of a hash of their content, so the draw is the same on
every machine; DATA_LICENSES.md says what is changed in them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manylora.corpus import Example, read_tasks, samples_path

SEED = "manylora samples 1"
ROWS = {"train": 200, "test": 60}

# Two tasks of 8 well-separated intents each, out of 77.
INTENTS = {
    "intent_banking_a": (
        "age_limit",
        "card_about_to_expire",
        "cash_withdrawal_charge",
        "compromised_card",
        "direct_debit_payment_not_recognised",
        "edit_personal_details",
        "pending_top_up",
        "visa_or_mastercard",
    ),
    "intent_banking_b": (
        "automatic_top_up",
        "card_arrival",
        "card_linking",
        "card_not_working",
        "exchange_rate",
        "supported_cards_and_currencies",
        "top_up_limits",
        "verify_my_identity",
    ),
}

# Rows left out after reading the draw. An e-mail address, a telephone number, a private person.
PERSONAL = re.compile(
    r"\S+@\w+\.\w+|\b\d{3}[-. ]\d{3}[-. ]\d{4}\b|\b(mr|mrs|ms)\.? [a-z]|\blover\b", re.I
)
# Violence, sex, drugs, insults.
UNFIT = re.compile(
    r"\b(abus|assault|blood|cocaine|corpse|damn|drug|gay|gun|idiot|kill|mest?rual|menstr|minor"
    r" victim|molest|murder|naked|nazi|negro|nude|prostitut|rape|sex|shit|slave|stupid|suicid"
    r"|terroris|tortur|weapon)\w*",
    re.I,
)


@dataclass(frozen=True)
class Draw:
    source: str
    fits: Callable[[Example], bool]
    label: Callable[[Example], str]
    """Rows are drawn from the labels in turn, as evenly as there are rows."""


DRAWS = {
    "code_bash": Draw(
        "code_bash", lambda row: len(row.input) <= 150 and len(row.output) <= 60, lambda _: ""
    ),
    **{
        task: Draw(
            "intent_banking77",
            lambda row, intents=intents: row.output in intents,  # type: ignore[misc]
            lambda row: row.output,
        )
        for task, intents in INTENTS.items()
    },
    "legal_cuad": Draw("legal_cuad", lambda row: len(row.prompt) <= 450, lambda row: row.output),
    "legal_overruling": Draw(
        "legal_overruling", lambda row: len(row.prompt) <= 400, lambda row: row.output
    ),
}


def drawn(rows: list[Example], draw: Draw, count: int) -> list[Example]:
    fitting = [
        row
        for row in rows
        if draw.fits(row) and not PERSONAL.search(row.prompt) and not UNFIT.search(row.prompt)
    ]
    by_label: dict[str, list[Example]] = {}
    for row in sorted(fitting, key=content_hash):
        by_label.setdefault(draw.label(row), []).append(row)
    turns = itertools.zip_longest(*(by_label[label] for label in sorted(by_label)))
    taken = [row for turn in turns for row in turn if row is not None][:count]
    return sorted(taken, key=content_hash)


def content_hash(row: Example) -> str:
    return hashlib.sha256(json.dumps([SEED, row.prompt, row.output]).encode()).hexdigest()


def as_line(row: Example, task: str) -> str:
    instruction = row.instruction
    if task in INTENTS:
        intents = ", ".join(INTENTS[task])
        instruction = f"Name the intent of the bank customer. Choose one of: {intents}."
    fields = {
        "task": task,
        "instruction": instruction,
        "input": row.input,
        "output": row.output,
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def main(source: Path) -> None:
    for split, count in ROWS.items():
        folder = samples_path() / split
        folder.mkdir(parents=True, exist_ok=True)
        for task, draw in DRAWS.items():
            file = f"{draw.source}.jsonl"
            rows = drawn(read_tasks(source / split / file)[draw.source], draw, count)
            text = "".join(as_line(row, task) for row in rows)
            (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
            print(f"{split}/{task}: {len(rows)} rows, {len(text.encode())} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_samples.py MULTITASK_FOLDER (with train/ and test/)")
    main(Path(sys.argv[1]))
