"""Exports equal the run they come from, in plain PEFT, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import manylora
from manylora.adapter.layer import layers_of
from manylora.export import ExportError, export_lora, lora_factors, plans
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach, tiny_llama

Make = Callable[..., Recipe]

EXACT = [
    {"method": "multilora"},
    {"method": "lora_split", "branch_ranks": [1, 3, 2]},
    {"method": "lora", "use_rslora": True},
    {"method": "hydralora", "gate": "uniform", "shared_rank": 2},
    {"method": "branch_per_cluster", "shared_rank": 2},
    {"method": "hydralora", "gate": "one_hot"},
    {"method": "lora_moe", "gate": "task", "share_B": True},
]


@pytest.mark.parametrize("adapter", EXACT, ids=lambda a: "-".join(map(str, a.values())))
def test_export_in_plain_peft_equals_the_run(
    make_recipe: Make, tmp_path: Path, adapter: dict[str, object]
) -> None:
    """`export_lora` itself compares logits in a process without manylora and fails beyond 1e-3."""
    run = train(make_recipe(**adapter))
    exports = export_lora(run, tmp_path / "out")
    assert all(done.exact and done.max_logit_difference < 1e-4 for done in exports)
    by_task = (run / "branch_selector.safetensors").is_file()
    names = {Path(done.path).name for done in exports}
    if by_task:
        shared = {"shared"} if "shared_rank" in adapter else set()
        assert names == {"colour", "copy", "parity"} | shared
        assert (tmp_path / "out" / "branch_selector.safetensors").is_file()
    else:
        assert names == {"out"}
    for done in exports:
        config = json.loads((Path(done.path) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"]
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        assert not config["use_rslora"]
        tensors = load_file(str(Path(done.path) / "adapter_model.safetensors"))
        ranks = {t.shape[0] for name, t in tensors.items() if "lora_A" in name}
        assert ranks == {config["r"]}
    recorded = json.loads((run / "exports.json").read_text())
    assert len(recorded) == len(exports)


def test_token_router_is_refused_and_static_is_called_an_approximation(
    make_recipe: Make, tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"))
    with pytest.raises(ExportError, match=r"every token.*--static"):
        export_lora(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exports = export_lora(run, tmp_path / "out", static=True)
    assert {Path(done.path).name for done in exports} == {"all_tasks", "colour", "copy", "parity"}
    assert not any(done.exact for done in exports)
    assert all("approximation" in done.note for done in exports)


def test_static_export_mixes_by_the_measured_means(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe(method="hydralora"))
    export_lora(run, tmp_path / "out", static=True)
    model = manylora.load(run)[0].cpu()
    layer = layers_of(model)[0]
    routing = json.loads((run / "routing.json").read_text())
    weights = torch.tensor(routing["tasks"]["copy"][routing["layers"].index(layer.name)])
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    tensors = load_file(str(tmp_path / "out" / "copy" / "adapter_model.safetensors"))
    key = f"base_model.model.{layer.name}.lora_"
    product = tensors[key + "B.weight"] @ tensors[key + "A.weight"]
    r = layer.branches["default"].ranks[0]
    A = layer.manylora_A["default"].weight
    blocks = layer.manylora_B["default"].weight.split(r, 1)
    expected = sum(w * (B @ A) for w, B in zip(weights, blocks, strict=True)) * (16 / r)
    assert torch.allclose(product, expected, atol=1e-5)


def test_a_wrong_export_fails_and_leaves_nothing(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))
    right = plans.lora_factors

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = right(*arguments)  # type: ignore[arg-type]
        return A, B * 1.5

    monkeypatch.setattr(plans, "lora_factors", wrong)
    with pytest.raises(ExportError, match=r"differ from the live run by .* nothing was kept"):
        export_lora(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (run / "exports.json").exists()


def test_used_output_folder_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe(method="multilora"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ExportError, match="not empty"):
        export_lora(run, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_static_without_measured_routing_says_how_to_get_it(
    make_recipe: Make, tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"))
    (run / "routing.json").unlink()
    with pytest.raises(ExportError, match="manylora eval"):
        export_lora(run, tmp_path / "out", static=True)


@pytest.mark.parametrize("gate", [None, "one_hot", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_multiply_to_the_delta_weight(gate: str | None, dtype: torch.dtype) -> None:
    model = attach(
        tiny_llama(dtype=dtype),
        method="lora_split",
        gate=gate,
        shared_rank=3,
        init_weights=False,
        lora_alpha=12,
    )
    for layer in layers_of(model):
        weights = layer.fixed_weights("default", 2) if gate == "one_hot" else None
        A, B = lora_factors(layer, "default", weights)
        assert A.dtype == B.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-15
        assert torch.allclose(B @ A, layer.get_delta_weight("default", weights), 0, tolerance)
        assert len(A) == (8 if gate == "one_hot" else 24) + 3


def test_exported_folder_loads_without_manylora_installed(
    make_recipe: Make, tmp_path: Path
) -> None:
    recipe = make_recipe(method="multilora")
    run = train(recipe)
    export_lora(run, tmp_path / "out")
    program = (
        "import sys; sys.modules['manylora'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model.peft_config['default'].peft_type.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("LORA")
