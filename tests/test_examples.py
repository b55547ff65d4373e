"""Recipes and scripts under examples/: they parse, and made-up files become the right rows."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_files import write_bench, write_jsonl
from contending import named
from manylora.corpus import CorpusError
from manylora.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
SCRIPT = EXAMPLES / "multilora_data.py"

Row = dict[str, Any]


def olora(label: object, sentence: str) -> Row:
    return {"label": label, "sentence": sentence}


def choices(question: str, answer: str) -> Row:
    return {"task": "qa", "instruction": "Choose.", "input": question, "output": answer}


SPANS = {"span1_index": 1, "span1_text": "lamp", "span2_index": 7, "span2_text": "it"}
CAUSE = 'Which sentence is the cause of "The jug fell."? Choose one between A and B.\n'
EFFECT = 'Which sentence is the effect of "The jug fell."? Choose one between A and B.\n'
SOURCES: dict[str, list[Row]] = {
    "official_train/superglue_BoolQ_train_olora.json": [
        olora("True", "question: is tea hot\npassage: Tea -- It is hot.\nquestion: no"),
        olora("False", "question: is ice hot\npassage: Ice -- It is cold."),
    ],
    "official_train/superglue_CB_train_olora.json": [
        olora("neutral", "sentence 1: Ann asked.\nsentence 2: Bob heard"),
        olora("contradiction", "sentence 1: No one sat.\nsentence 2: Bob sat"),
    ],
    "official_train/superglue_COPA_train_olora.json": [
        olora("B", f"{CAUSE}A: It was full.\nB: The cat pushed it."),
        olora("A", f"{EFFECT}A: It broke.\nB: It flew."),
    ],
    "official_train/superglue_MultiRC_train_olora.json": [
        olora("True", "paragraph: Al ate. \nquestion: Who ate?\ncandidate answer: Al, yes"),
        olora("False", "paragraph: Al ate. \nquestion: Who ate?\ncandidate answer: Bo"),
    ],
    "official_train/superglue_RTE_train.jsonl": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment", "idx": 1},
    ],
    "official_train/superglue_WSC_train.jsonl": [
        {"text": "The lamp lit the desk , and it glowed.", "target": SPANS, "label": True},
        {"text": "The lamp lit the desk , and it shone.", "target": SPANS, "label": False},
    ],
    "official_train/gsm8k_train.jsonl": [
        {"question": "Two and two?", "answer": "It is 2+2=<<2+2=4>>4, so $<<4*1=4>>4.\n#### 4"},
        {"question": "Two and three?", "answer": "5\n#### 5"},
    ],
    "multitask/train/qa_arc.jsonl": [
        choices("Which is hot?\nA. fire\nB. ice", "A. fire"),
        choices("Which is cold?\nA. fire\nB. ice", "B. ice"),
    ],
    "multitask/test/qa_arc.jsonl": [choices("Which is wet?\nA. rain\nB. sand", "A. rain")],
    "multitask/train/qa_obqa.jsonl": [
        choices("Cats eat\nA. mice\nB. cars", "A. mice"),
        choices("Cars eat\nA. mice\nB. fuel", "B. fuel"),
    ],
    "multitask/test/qa_obqa.jsonl": [choices("Dogs eat\nA. tin\nB. meat", "B. meat")],
    "instruct/dolly15k.jsonl.gz": [
        {"instruction": "Name it.", "context": "A dog.", "response": "Dog", "category": "qa"},
        {"instruction": "Say hi.", "context": "", "response": "Hi", "category": "chat"},
    ],
    "multitask/test/instr_dolly.jsonl": [
        {"task": "instr_dolly", "instruction": "say  hi.", "input": "", "output": "Hello"},
    ],
}


def row(instruction: str, output: str, given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "output": output}


# By lm-eval's own templates, read in its YAML: the rows to train on, and the first one held out.
RIGHT = "Is the answer correct?"
WSC = 'Question: In the passage above, does the pronoun "*it*" refer to "*lamp*"?\nAnswer:'
HELD_WSC = (
    "Passage: The ball 0 hit the table because *it* was soft.\n"
    'Question: In the passage above, does the pronoun "*it*" refer to "*the table*"?\nAnswer:'
)
KNOWN: dict[str, tuple[list[Row], Row]] = {
    "boolq": (
        [
            row("Tea -- It is hot.\nquestion: no\nQuestion: is tea hot?\nAnswer:", "yes"),
            row("Ice -- It is cold.\nQuestion: is ice hot?\nAnswer:", "no"),
        ],
        row("0 -- A number.\nQuestion: is 0 even?\nAnswer:", "yes"),
    ),
    "cb": (
        [
            row("Ann asked.\nQuestion: Bob heard. True, False, or Neither?\nAnswer:", "Neither"),
            row("No one sat.\nQuestion: Bob sat. True, False, or Neither?\nAnswer:", "False"),
        ],
        row("He said 0.\nQuestion: it is 0. True, False, or Neither?\nAnswer:", "True"),
    ),
    "copa": (
        [
            row("The jug fell because", "the cat pushed it."),
            row("The jug fell therefore", "it broke."),
        ],
        row("Man 0 fell because", "he slipped."),
    ),
    "multirc": (
        [
            row(f"Al ate. \nQuestion: Who ate?\nAnswer: Al, yes\n{RIGHT}", "yes"),
            row(f"Al ate. \nQuestion: Who ate?\nAnswer: Bo\n{RIGHT}", "no"),
        ],
        row(f"Text 0.\nQuestion: Who came 0th?\nAnswer: a 'b'\n{RIGHT}", "no"),
    ),
    "sglue_rte": (
        [
            row("It rains.\nQuestion: It is wet. True or False?\nAnswer:", "True"),
            row("It rains.\nQuestion: It is dry. True or False?\nAnswer:", "False"),
        ],
        row("0 men sat.\nQuestion: 0 men stood. True or False?\nAnswer:", "True"),
    ),
    "wsc": (
        [
            row(f"Passage: The lamp lit the desk, and *it* glowed.\n{WSC}", "yes"),
            row(f"Passage: The lamp lit the desk, and *it* shone.\n{WSC}", "no"),
        ],
        row(HELD_WSC, "no"),
    ),
    "gsm8k": (
        [
            row("Question: Two and two?\nAnswer:", "It is 2+2=4, so $4.\n#### 4"),
            row("Question: Two and three?\nAnswer:", "5\n#### 5"),
        ],
        row("Question: 0 apples?\nAnswer:", "It is 0.\n#### 0"),
    ),
    "arc": (
        [
            row("Which is hot?\nA. fire\nB. ice\nAnswer:", "A"),
            row("Which is cold?\nA. fire\nB. ice\nAnswer:", "B"),
        ],
        row("Which is wet?\nA. rain\nB. sand\nAnswer:", "A"),
    ),
    "openbookqa": (
        [
            row("Cats eat\nA. mice\nB. cars\nAnswer:", "A"),
            row("Cars eat\nA. mice\nB. fuel\nAnswer:", "B"),
        ],
        row("Dogs eat\nA. tin\nB. meat\nAnswer:", "B"),
    ),
    "dolly": (
        [row("Name it.", "Dog", "A dog."), row("Say hi.", "Hi")],
        row("say  hi.", "Hello"),
    ),
}


@pytest.fixture(scope="module")
def mixture() -> Callable[[Path], dict[str, tuple[list[Row], list[Row]]]]:
    pytest.importorskip("lm_eval")
    return runpy.run_path(str(SCRIPT))["mixture"]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two made-up rows of each data set, in the form of its own files."""
    write_bench(tmp_path / "bench", 2, [], [])
    for name, found in SOURCES.items():
        write_source(tmp_path / name, found)
    return tmp_path


def write_source(path: Path, found: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(found), encoding="utf-8")
    else:
        write_jsonl(path, found)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))


def test_there_are_recipes() -> None:
    assert EXAMPLES / "multilora_mixture.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses(path: Path) -> None:
    assert load_recipe(path).output == f"runs/{path.stem}"


def test_the_multilora_mixture_can_be_compared() -> None:
    recipe = load_recipe(EXAMPLES / "multilora_mixture.yaml")
    assert recipe.validation > 0  # the rates are tuned on it
    methods = ["lora", "lora_split", "multilora", "hydralora"]
    found = named(*methods, **recipe.adapter.model_dump(exclude_unset=True))
    assert [each.name for each in found] == methods


def test_official_rows_become_lm_evals_questions(sources: Path, mixture: Any) -> None:
    found = mixture(sources)
    assert set(found) == set(KNOWN)
    for name, (train, held) in KNOWN.items():
        assert found[name][0] == train, name
        assert found[name][1][0] == held, name
    assert [len(found[name][1]) for name in ("boolq", "multirc")] == [2, 4]


def test_the_script_writes_what_the_recipe_reads(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    out = tmp_path / "out"
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(sources), str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    recipe = load_recipe(EXAMPLES / "multilora_mixture.yaml", [f"data={out}", "validation=0"])
    corpus = recipe.load_corpus()
    assert set(corpus.tasks) == set(corpus.test) == set(KNOWN)
    for name, (train, _) in KNOWN.items():
        asked = {example.prompt[-1]["content"] for example in corpus.train[name]}
        kept = train[:1] if name == "dolly" else train  # its second row is asked by a held-out one
        assert asked == {"\n".join(filter(None, (r["instruction"], r["input"]))) for r in kept}


DAMAGE = {
    "another form": ("superglue_BoolQ_train_olora.json", olora("True", "passage: x"), "question: "),
    "another label": ("superglue_COPA_train_olora.json", olora("C", f"{CAUSE}A: x\nB: y"), "'C'"),
    "a label that is no word": ("superglue_CB_train_olora.json", olora(1, "x"), "'label', got 1"),
    "no object": ("superglue_MultiRC_train_olora.json", "text", "expected an object, got str"),
    "a field missing": ("superglue_RTE_train.jsonl", {"premise": "x"}, "no field 'hypothesis'"),
    "a span outside": (
        "superglue_WSC_train.jsonl",
        {"text": "One word", "target": SPANS, "label": True},
        "span2_index is outside the text's 2 words",
    ),
    "no number": ("gsm8k_train.jsonl", {"question": "x", "answer": "4"}, "#### NUMBER"),
    "no such option": ("qa_arc.jsonl", choices("Which?\nA. a\nB. b", "C. c"), "'C. c' is no line"),
    "no letter": ("qa_obqa.jsonl", choices("Which?\nyes\nno", "yes"), "'yes' is no line"),
    "a column missing": ("dolly15k.jsonl.gz", {"instruction": "x"}, "expected a text 'context'"),
}


@pytest.mark.parametrize(("file", "damaged", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_row_is_named_with_its_file(
    sources: Path, mixture: Any, file: str, damaged: Row, said: str
) -> None:
    name = next(name for name in SOURCES if name.endswith(f"/{file}"))
    write_source(sources / name, [SOURCES[name][0], damaged])
    with pytest.raises(CorpusError) as error:
        mixture(sources)
    assert str(sources / name) + ", row 2: " in str(error.value)
    assert said in str(error.value)


def test_the_script_ends_with_one_message(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    file = sources / "official_train/superglue_CB_train_olora.json"
    file.write_text("[{", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(sources), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"error: {file}: not JSON"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not (tmp_path / "out").exists()
