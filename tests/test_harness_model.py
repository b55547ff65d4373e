"""A live adapter under lm-eval: our scores, the right branch for each prompt, and what is kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from bench_files import write_bench
from manylora.adapter.selector import BranchSelector
from manylora.evaluate.answers import Question, generate_answers, score_answers
from manylora.evaluate.harness.model import AdapterLM
from manylora.evaluate.harness.run import evaluate_benchmarks
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach

NAMES = ["law", "medicine"]
TEXTS = [
    "the court and the judge",
    "a pill for the pain",
    "court court judge",
    "pain and pills, pain",
]
ANSWERS = [" yes", " no", " perhaps so"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def adapted(folder: Path, method: str, **config: Any) -> tuple[PeftModel, Any]:
    """A tiny model whose adapter changes what it says, branch by branch."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = attach(base, method=method, r=2, num_branches=2, task_type="CAUSAL_LM", **config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "manylora_B" in name:
                tensor.normal_(std=0.3, generator=generator)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def selector(tokenizer: Any) -> BranchSelector:
    prompts = [tokenizer.encode(text) for text in (*TEXTS, "the judge", "a pill, pain")]
    return BranchSelector.fit(prompts, [0, 1, 0, 1, 0, 1], NAMES, buckets=512, refuse=0.5)


def requests(kind: str, arguments: list[tuple[str, Any]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=0, metadata=("t", i, 1))  # type: ignore[arg-type]
        for i, argument in enumerate(arguments)
    ]


def ours(
    model: PeftModel, tokenizer: Any, branches: list[int] | None, texts: list[str] = TEXTS
) -> list[float]:
    """What our own scoring says of every text and answer, one question at a time."""
    found = []
    for i, text in enumerate(texts):
        for answer in ANSWERS:
            both = tokenizer.encode(text + answer)
            prompt = tokenizer.encode(text)
            branch = None if branches is None else branches[i]
            question = Question(prompt, [both[len(prompt) :]], 0, 0, branch)
            ((score,),) = score_answers(model, [question], 0)
            found.append(score.log_likelihood)
    return found


PAIRS = [(text, answer) for text in TEXTS for answer in ANSWERS]


def test_its_log_likelihoods_are_ours(tiny_folder: Path) -> None:
    model, tokenizer = adapted(tiny_folder, "hydralora")
    lm = AdapterLM(model, tokenizer, 4, quiet())
    texts = ["one text that is longer than the others, " * 5 + "so", *TEXTS, "a"]
    pairs = [(text, answer) for text in texts for answer in ANSWERS]
    found = [answer[0] for answer in lm.loglikelihood(requests("loglikelihood", pairs))]
    assert found == pytest.approx(ours(model, tokenizer, None, texts), abs=1e-4)
    with model.disable_adapter():
        assert found != pytest.approx(ours(model, tokenizer, None, texts), abs=1e-2)


def test_it_computes_in_the_precision_of_the_run_and_writes_in_fp32_on_a_cpu(
    tiny_folder: Path,
) -> None:
    model, tokenizer = adapted(tiny_folder, "hydralora")
    exact, rough = (
        AdapterLM(model, tokenizer, 4, quiet(), precision=precision)
        for precision in ("fp32", "bf16")
    )
    first, second = (
        [answer[0] for answer in lm.loglikelihood(requests("loglikelihood", PAIRS))]
        for lm in (exact, rough)
    )
    assert first != second
    assert first == pytest.approx(second, rel=0.05)
    assert len({*second}) > 8  # of 12: bf16 likelihoods alone would be the same in many places
    told = [(text, {"until": [], "max_gen_toks": 9, "do_sample": False}) for text in TEXTS]
    assert exact.generate_until(requests("generate_until", told)) == rough.generate_until(
        requests("generate_until", told)
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_branch_is_chosen_from_the_prompt_alone(tiny_folder: Path, batch_size: int) -> None:
    model, tokenizer = adapted(tiny_folder, "branch_per_cluster", shared_rank=0)
    chooser = model.peft_config["default"].branch_selector = selector(tokenizer)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    branches = [
        int(chooser.select(torch.tensor([p]), torch.ones(1, len(p)).bool())) for p in prompts
    ]
    assert branches == [0, 1, 0, 1]
    lm = AdapterLM(model, tokenizer, batch_size, quiet())
    found = [answer[0] for answer in lm.loglikelihood(requests("loglikelihood", PAIRS))]
    assert found == pytest.approx(ours(model, tokenizer, branches), abs=1e-4)
    assert found != pytest.approx(ours(model, tokenizer, [0] * 4), abs=1e-2)


def test_a_named_task_fixes_the_branch(tiny_folder: Path) -> None:
    model, tokenizer = adapted(tiny_folder, "branch_per_cluster")
    model.peft_config["default"].branch_selector = selector(tokenizer)
    lm = AdapterLM(model, tokenizer, 4, quiet(), task="medicine")
    found = [answer[0] for answer in lm.loglikelihood(requests("loglikelihood", PAIRS))]
    assert found == pytest.approx(ours(model, tokenizer, [1] * 4), abs=1e-4)
    assert isinstance(
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a b",)]))[0], float
    )  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no task 'code' in the adapter; it has law, medicine"):
        AdapterLM(model, tokenizer, 4, quiet(), task="code")


def test_it_writes_what_our_greedy_decoding_writes(tiny_folder: Path) -> None:
    model, tokenizer = adapted(tiny_folder, "branch_per_cluster")
    model.peft_config["default"].branch_selector = selector(tokenizer)
    lm = AdapterLM(model, tokenizer, 3, quiet())
    wanted = {"until": ["\n\n\n"], "max_gen_toks": 9, "do_sample": False}
    found = lm.generate_until(requests("generate_until", [(text, dict(wanted)) for text in TEXTS]))
    prompts = [tokenizer.encode(text) for text in TEXTS]
    ids = generate_answers(model, prompts, 0, [tokenizer.eos_token_id], 9, ids=[0, 1, 0, 1])
    assert found == [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert len(set(found)) > 1


def test_texts_without_a_prompt_need_a_named_task(tiny_folder: Path) -> None:
    model, tokenizer = adapted(tiny_folder, "branch_per_cluster")
    model.peft_config["default"].branch_selector = selector(tokenizer)
    lm = AdapterLM(model, tokenizer, 4, quiet())
    with pytest.raises(ValueError, match="give task=, one of law, medicine"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a b",)]))  # type: ignore[list-item]


def test_a_task_for_an_adapter_without_branches_of_tasks_is_refused(tiny_folder: Path) -> None:
    model, tokenizer = adapted(tiny_folder, "hydralora")
    with pytest.raises(ValueError, match="does not choose its branch by task"):
        AdapterLM(model, tokenizer, 4, quiet(), task="law")


def test_a_run_keeps_its_benchmarks_and_adds_to_them(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"), quiet())
    bench, told = write_bench(tmp_path / "bench", 6, ["anatomy"], ["navigate"]), quiet()
    first = evaluate_benchmarks(run, ["boolq", "cb"], told, data_dir=bench, batch_size=4)
    again = evaluate_benchmarks(
        run, ["cb", "gsm8k_cot"], told, data_dir=bench, shots=0, limit=2, batch_size=4
    )
    kept = json.loads((run / "benchmarks.json").read_text(encoding="utf-8"))
    assert list(kept["tasks"]) == ["boolq_0shot", "cb_0shot", "gsm8k_cot_0shot"]
    assert kept["tasks"]["boolq_0shot"] == first["tasks"]["boolq_0shot"]
    assert kept["tasks"]["cb_0shot"] == again["tasks"]["cb_0shot"]
    assert kept["tasks"]["cb_0shot"]["n"] == 2
    rows = pq.read_table(run / "benchmarks.parquet").to_pylist()
    assert [row["value"] for row in rows if row["task"] == "boolq"] == [
        example["value"] for example in first["examples"] if example["task"] == "boolq"
    ]
    assert {row["row"] for row in rows if row["task"] == "cb"} == {0, 1}
    assert first["truncated"] == 0
    model, tokenizer = adapted(Path(make_recipe().model), "hydralora")
    alone = evaluate_benchmarks((model, tokenizer), ["boolq"], told, data_dir=bench, limit=3)
    assert alone["tasks"]["boolq_0shot"]["n"] == 3


@pytest.mark.parametrize("method", ["hydralora", "branch_per_cluster"])
def test_the_base_model_is_measured_on_the_same_questions(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    bench, told = write_bench(tmp_path / "bench", 12, ["anatomy"], ["navigate"]), quiet()
    options: dict[str, Any] = {"data_dir": bench, "batch_size": 4}
    names = ["cb", "sglue_rte", "mmlu_anatomy"]
    model, tokenizer = adapted(tiny_folder, method)
    if method == "branch_per_cluster":
        model.peft_config["default"].branch_selector = selector(tokenizer)
        options["task"] = "law"
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    both = evaluate_benchmarks((model, tokenizer), names, told, base=True, **options)
    alone = evaluate_benchmarks((model, tokenizer), names, told, **options)
    options["task"] = None
    theirs = evaluate_benchmarks((plain, tokenizer), names, told, **options)
    assert list(both["tasks"]) == list(alone["tasks"]) == list(theirs["tasks"])
    for name, entry in both["tasks"].items():
        assert entry["metrics"] == alone["tasks"][name]["metrics"]
        assert entry["base"]["metrics"] == theirs["tasks"][name]["metrics"]
        for metric, (mean, low, high) in entry["difference"]["metrics"].items():
            gain = entry["metrics"][metric][0] - entry["base"]["metrics"][metric][0]
            assert mean == pytest.approx(gain)
            assert low <= mean <= high
    base_values = [row["base_value"] for row in both["examples"]]
    assert base_values == [row["value"] for row in theirs["examples"]]
    assert any(row["base_value"] != row["value"] for row in both["examples"])
    assert {row["base_value"] for row in alone["examples"]} == {None}


def test_a_model_without_adapter_has_no_base_model(tiny_folder: Path, tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "bench", 2, ["anatomy"], ["navigate"])
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    pair = (plain, AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no adapter to do without"):
        evaluate_benchmarks(pair, ["boolq"], quiet(), data_dir=bench, base=True)


def test_a_prompt_that_loses_its_beginning_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    bench, told = write_bench(tmp_path / "bench", 2, ["anatomy"], ["navigate"]), quiet()
    pair = adapted(tiny_folder, "hydralora")
    results = evaluate_benchmarks(pair, ["gsm8k_cot"], told, data_dir=bench, batch_size=2)
    assert results["truncated"] == 2
    assert "2 requests are longer than the 512 tokens" in told.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="bbh_cot_fewshot_navigate: answers of up to 1024 tokens"):
        evaluate_benchmarks(pair, ["bbh_cot_fewshot_navigate"], told, data_dir=bench)
