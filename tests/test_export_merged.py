"""A merged Transformers folder: the live run's logits, without manylora."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import manylora
from manylora.export import ExportError, merged
from manylora.export.merged import Update, export_merged
from manylora.export.static import export_static
from manylora.recipe import Recipe
from manylora.run import recipe_of
from manylora.train import train

Make = Callable[..., Recipe]
TOKENS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize(
    ("adapter", "task"),
    [
        ({"method": "lora"}, None),
        ({"method": "multilora"}, None),
        ({"method": "lora_split", "branch_ranks": [1, 3, 2]}, None),
        ({"method": "hydralora", "gate": "uniform", "shared_rank": 2}, None),
        ({"method": "branch_per_cluster", "shared_rank": 2}, "copy"),
        ({"method": "lora_moe", "gate": "task"}, "parity"),
        ({"method": "lora_split", "modules_to_save": ["lm_head"]}, None),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_merged_folder_has_the_logits_of_the_run(
    make_recipe: Make, tmp_path: Path, adapter: dict[str, object], task: str | None
) -> None:
    run = train(make_recipe(**adapter))
    (done,) = export_merged(run, tmp_path / "out", Update(task))
    assert done.exact and done.kind == "merged" and done.max_logit_difference < 1e-4
    model, tokenizer = manylora.load(run)
    model.cpu()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(ours).__module__.startswith("transformers")
    if task is None:
        live = logits(model)
    else:
        with manylora.branch_ids(model, ["colour", "copy", "parity"].index(task)):
            live = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert (live - base).abs().max() > 1e-2  # there is something to merge
    assert torch.allclose(logits(ours), live, atol=1e-4)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("sky 1").input_ids == tokenizer("sky 1").input_ids
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: transformers" in card
    assert json.loads((run / "exports.json").read_text())[0]["kind"] == "merged"


def test_merged_folder_loads_without_manylora(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe(method="multilora"))
    export_merged(run, tmp_path / "out")
    program = (
        "import sys; sys.modules['manylora'] = sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model.config.model_type)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("llama")


def test_run_with_a_branch_each_needs_a_task_by_name(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe(method="branch_per_cluster"))
    with pytest.raises(ExportError, match="--task, one of colour, copy, parity"):
        export_merged(run, tmp_path / "out")
    with pytest.raises(ExportError, match="task='colours'; the run has colour"):
        export_merged(run, tmp_path / "out", Update("colours"))
    assert not (tmp_path / "out").exists()


def test_router_merges_only_statically_and_the_better_way(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="hydralora"))
    with pytest.raises(ExportError, match="every token"):
        export_merged(run, tmp_path / "out")
    with pytest.raises(ExportError, match="task='colours'; the run has colour, copy, parity"):
        export_merged(run, tmp_path / "out", Update("colours", static=True))
    assert not (tmp_path / "out").exists()
    (done,) = export_merged(run, tmp_path / "out", Update(static=True, rows=16))
    said = r"approximation; it loses -?\d.* would lose -?\d"
    assert not done.exact and re.search(said, done.note)
    assert json.loads((run / "exports.json").read_text())[0]["gap"] == done.gap != {}
    plain = {Path(one.path).name: one for one in export_static(run, tmp_path / "static", rows=16)}
    gaps = {
        kind: sum(gap[0] for gap in plain[f"{kind}_all_tasks"].gap.values())
        for kind in ("mean", "fit")
    }
    best = min(gaps, key=lambda kind: gaps[kind])
    for task, gap in plain[f"{best}_all_tasks"].gap.items():
        assert done.gap.pop(task) == pytest.approx(gap, rel=1e-3, abs=1e-6)
    assert not done.gap
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(recipe_of(run).model).state_dict()
    lora = load_file(tmp_path / "static" / f"{best}_all_tasks" / "adapter_model.safetensors")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        A, B = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = base[f"{name}.weight"] + B @ A
        assert torch.allclose(weights[f"{name}.weight"], expected, atol=1e-5)


def test_weights_are_saved_in_the_dtype_of_the_base_and_the_rounding_is_said(
    make_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_folder, half)
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(half)
    recipe = make_recipe(method="multilora")
    run = train(recipe.model_copy(update={"model": str(half)}))
    (done,) = export_merged(run, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1e-4 < done.max_logit_difference < 0.5
    assert f"{done.max_logit_difference:.1e}" in done.note
    assert "rounding to bfloat16 moved a logit by" in done.note


def test_wrong_merge_fails_and_leaves_nothing(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))
    right = merged.live_logits
    monkeypatch.setattr(merged, "live_logits", lambda *given: right(*given) + 0.01)
    with pytest.raises(ExportError, match="merged model: logits differ"):
        export_merged(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_killed_export_leaves_nothing_and_the_next_one_works(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merged, "model_logits", killed)
        with pytest.raises(KeyboardInterrupt):
            export_merged(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    (tmp_path / ".out.partial").mkdir()  # what a kill that no program survives leaves
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    export_merged(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4
    assert not (tmp_path / ".out.partial").exists()
