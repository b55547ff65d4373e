"""The doctor says what would stop a run, and how much memory it needs, without running it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manylora import doctor
from manylora.adapter.config import ManyLoraConfig
from manylora.doctor import Finding, examine, print_findings
from manylora.memory import Estimate, estimate, longest_rows, read_shapes
from manylora.recipe import Recipe, load_recipe
from tiny import attach, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<end>"
    ).save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for task, words in (("long", 30), ("short", 3)):
        rows = [
            {"instruction": "yes " * words, "input": f"no{i}", "output": "no no"} for i in range(10)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def recipe_of(model: Path, data: Path, *more: str) -> Recipe:
    return load_recipe(
        None, [f"model={model}", f"data={data}", f"output={data.parent / 'run'}", *more]
    )


def of(findings: list[Finding], topic: str, status: str = "problem") -> list[str]:
    return [f.text for f in findings if f.topic == topic and f.status == status]


def needed(model: Path, data: Path, *more: str, longest: int = 40) -> Estimate:
    return estimate(recipe_of(model, data, *more), str(model), 2, longest, 3, CPU)


def part(found: Estimate, name: str) -> int:
    return sum(part.bytes for part in found.parts if part.name == name)


def test_a_recipe_that_can_run_has_no_problem(model: Path, data: Path) -> None:
    findings = examine(recipe_of(model, data))
    assert [f for f in findings if f.status == "problem"] == []
    assert {f.topic for f in findings} >= {
        "packages",
        "hardware",
        "base model",
        "disk",
        "recipe",
        "data",
        "memory",
    }


def test_without_a_recipe_only_the_machine_is_examined() -> None:
    topics = {f.topic for f in examine(None)}
    assert topics == {"packages", "hardware", "base model", "disk"}


def test_nothing_is_written(model: Path, data: Path) -> None:
    before = sorted(data.parent.rglob("*"))
    examine(recipe_of(model, data))
    assert sorted(data.parent.rglob("*")) == before


def test_a_package_outside_its_window_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "peft" else real(name))
    findings = [f for f in doctor._packages() if f.status == "problem"]
    assert ["peft is 0.1.0" in f.text for f in findings] == [True]
    assert findings[0].remedy.startswith("pip install 'peft")


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version

    def version(name: str) -> str:
        if name == "trl":
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    assert any("trl is not installed" in f.text for f in doctor._packages())


def test_the_versions_installed_here_are_shown() -> None:
    texts = " ".join(f.text for f in doctor._packages())
    assert f"torch {Version(torch.__version__)}" in texts


def test_more_threads_than_cores_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(doctor.cpu_cores() + 1))
    assert any("OMP_NUM_THREADS" in f.text for f in doctor._hardware())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not any("OMP_NUM_THREADS" in f.text for f in doctor._hardware())


def test_a_cuda_build_without_a_gpu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    notes = of(list(doctor._hardware()), "hardware", "note")
    assert any("CUDA 12.9" in text for text in notes)


def test_unreadable_data_gives_the_corpus_error(model: Path, data: Path) -> None:
    (data / "broken.jsonl").write_text('{"instruction": "a"}\n')
    assert "broken.jsonl:1" in of(examine(recipe_of(model, data)), "data")[0]


def test_a_used_run_folder_is_a_problem(model: Path, data: Path) -> None:
    recipe = recipe_of(model, data)
    recipe.run.mkdir()
    assert of(list(doctor._settings(recipe)), "recipe") == []
    (recipe.run / "scores.json").write_text("{}")
    assert "is not empty" in of(list(doctor._settings(recipe)), "recipe")[0]


def test_fp16_on_a_cpu_is_a_problem(model: Path, data: Path) -> None:
    findings = examine(recipe_of(model, data, "train.precision=fp16"))
    assert any("fp16" in text for text in of(findings, "recipe"))


def test_quantize_without_bitsandbytes_is_a_problem(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    findings = list(doctor._settings(recipe_of(model, data, "quantize=4bit")))
    assert "bitsandbytes" in of(findings, "recipe")[0]


def test_a_one_hot_gate_needs_a_branch_for_each_task(model: Path, data: Path) -> None:
    one_hot = "adapter.method=branch_per_cluster"
    assert of(examine(recipe_of(model, data, one_hot)), "data") == []
    wrong = examine(recipe_of(model, data, one_hot, "adapter.num_branches=5"))
    assert "5 branches" in of(wrong, "data")[0]


def test_modules_that_the_model_lacks_are_a_problem(model: Path, data: Path) -> None:
    findings = examine(recipe_of(model, data, "adapter.target_modules=[query]"))
    assert "q_proj" in of(findings, "memory")[0]


def test_too_little_memory_is_a_problem_with_a_remedy(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (2**30, 2**20))
    found = [f for f in examine(recipe_of(model, data)) if f.topic == "memory"]
    assert found[0].status == "problem"
    assert "batch_size" in found[0].remedy
    assert found[0].table[-1][0] == "total"


@pytest.mark.parametrize("method", ["lora", "multilora", "hydralora", "lora_moe"])
def test_parameters_are_counted_as_peft_counts_them(method: str, model: Path, data: Path) -> None:
    found = needed(model, data, f"adapter.method={method}")
    trained, total = attach(tiny_llama(), method=method).get_nb_trainable_parameters()
    assert (found.adapter_parameters, found.base_parameters) == (trained, total - trained)


def saved_bytes(method: str, batch: int, length: int) -> int:
    """Bytes that autograd keeps for one batch through the blocks, in float32."""
    adapted = attach(tiny_llama(attn_implementation="sdpa"), method=method).train()
    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted.base_model.model.model(torch.ones(batch, length, dtype=torch.long))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["lora", "hydralora", "multilora"])
def test_activations_are_close_to_what_autograd_keeps(method: str, model: Path, data: Path) -> None:
    found = needed(
        model, data, "train.precision=fp32", "train.batch_size=4", f"adapter.method={method}"
    )
    ratio = part(found, "activations") / 2.0 / saved_bytes(method, 4, 40)
    assert 0.9 < ratio < 1.2


def test_the_estimate_follows_the_recipe(model: Path, data: Path) -> None:
    plain = needed(model, data)
    larger = needed(model, data, "train.batch_size=16")
    assert part(larger, "activations") == pytest.approx(2 * part(plain, "activations"), rel=1e-6)
    saving = needed(model, data, "train.gradient_checkpointing=true")
    assert part(saving, "activations") < part(plain, "activations")
    half = needed(model, data, "dtype=bfloat16")
    assert part(half, "base weights") * 2 == part(plain, "base weights")
    packed = needed(model, data, "quantize=4bit")
    assert part(packed, "base weights") < part(plain, "base weights")
    dropped = needed(model, data, "adapter.lora_dropout=0.1")
    assert part(dropped, "activations") > part(plain, "activations")


def test_the_longest_row_counts_and_rows_too_long_do_not(model: Path, data: Path) -> None:
    corpus = recipe_of(model, data).load_corpus()
    assert longest_rows(corpus, str(model), 1024) == (34, 3)
    assert longest_rows(corpus, str(model), 20) == (20, 20)


def test_shapes_are_read_without_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    shapes = read_shapes(str(tmp_path), ManyLoraConfig(task_type="CAUSAL_LM"))
    assert (shapes.hidden, shapes.vocabulary, shapes.blocks) == (32, 64, 2)
    assert len(shapes.linears) == len(shapes.adapted) == 14


def test_the_exit_code_tells_whether_something_would_stop_the_run() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    note = Finding("disk", "note", "[brackets] are text", "do this", (("a", "1.00", "b"),))
    assert print_findings([note], console) == 0
    assert "[brackets] are text" in out.getvalue()
    assert "do this" in out.getvalue()
    assert print_findings([note, Finding("data", "problem", "no")], console) == 1
    assert "1 problem" in out.getvalue()
