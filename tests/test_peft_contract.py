"""manylora behaves as PEFT's own methods do: saving, loading, several adapters, transformers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import manylora
from tiny import VOCAB, attach, tiny_llama

METHODS = ["hydralora", "multilora", "branch_per_cluster"]
IDS = torch.tensor([0, 1, 2])
X = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad(), manylora.branch_ids(model, IDS):
        return model.eval()(input_ids=x).logits


def adapted(method: str, seed: int = 0, **config: object) -> PeftModel:
    """A tiny Llama with an adapter that is not the identity."""
    fields = {"task_type": "CAUSAL_LM", "init_weights": False} | config
    return attach(tiny_llama(), seed=seed, method=method, **fields)


def add(model: PeftModel, name: str, seed: int, method: str, **config: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            name,
            manylora.ManyLoraConfig(
                method=method, task_type="CAUSAL_LM", init_weights=False, **config
            ),
        )


def run_fresh(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_bit_equal_under_any_name(
    method: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = adapted(method)
    expected = logits(model)
    assert not torch.equal(expected, logits_of_base())
    model.save_pretrained(tmp_path)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(
            tiny_llama(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(loaded), expected)
        assert not any(p.requires_grad for p in loaded.parameters())


def logits_of_base() -> Tensor:
    with torch.no_grad():
        return tiny_llama().eval()(X).logits


def test_a_fresh_process_loads_it_three_ways_and_refuses_it_without_the_import(
    tmp_path: Path,
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = attach(base, method="multilora", task_type="CAUSAL_LM", init_weights=False)
    torch.save({"x": X, "logits": logits(model)}, tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "multilora")
    hydra = attach(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        method="hydralora",
        task_type="CAUSAL_LM",
        init_weights=False,
    )
    torch.save({"x": X, "logits": logits(hydra)}, tmp_path / "expected_hydra.pt")
    hydra.save_pretrained(tmp_path / "hydralora")
    code = """
import sys, torch, manylora
from pathlib import Path
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
for folder, file in (("multilora", "expected.pt"), ("hydralora", "expected_hydra.pt")):
    expected = torch.load(root / file, weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    for model in (
        PeftModel.from_pretrained(base, root / folder),
        AutoPeftModelForCausalLM.from_pretrained(root / folder),
        AutoModelForCausalLM.from_pretrained(root / folder),
    ):
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=expected["x"]).logits, expected["logits"])
print("all equal")
"""
    done = run_fresh(code, tmp_path)
    assert done.stdout.strip() == "all equal", done.stderr
    code = """
import sys, peft, transformers
for loader in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
    try:
        loader.from_pretrained(sys.argv[1])
    except KeyError as error:
        print(loader.__name__, error)
"""
    done = run_fresh(code, tmp_path / "multilora")
    assert done.stdout.split() == [
        "AutoModelForCausalLM",
        "'MANYLORA'",
        "AutoPeftModelForCausalLM",
        "'MANYLORA'",
    ], done.stderr


SHAPES = {
    "hydralora": {"A": (8, 32), "B": (32, 24), "router": (3, 32)},
    "multilora": {"A": (24, 32), "B": (32, 24), "scale": (3, 32)},
    "branch_per_cluster": {
        "A": (24, 32),
        "B": (32, 24),
        "shared_A": (2, 32),
        "shared_B": (32, 2),
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_holds_safetensors_with_the_fixed_names_and_shapes(
    method: str, tmp_path: Path
) -> None:
    shared_rank = 2 if method == "branch_per_cluster" else 0
    model = adapted(method, shared_rank=shared_rank)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    layer = "base_model.model.model.layers.0.self_attn.q_proj."
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        key.removeprefix(layer): tuple(tensor.shape)
        for key, tensor in saved.items()
        if key.startswith(layer)
    } == {f"manylora_{part}.weight": shape for part, shape in SHAPES[method].items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = tuple(f"manylora_{part}.default.weight" for part in SHAPES[method])
    assert len(trainable) == len(saved)
    assert all(name.endswith(parts) for name in trainable)


@pytest.mark.parametrize("config_type", [manylora.HydraLoraConfig, manylora.MultiLoraConfig])
def test_the_shorthand_configs_save_and_load_as_manylora_config(
    config_type: type[manylora.ManyLoraConfig], tmp_path: Path
) -> None:
    config = config_type(r=4, num_branches=2, target_modules=["q_proj"], alpha_pattern={"q": 2.0})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is manylora.ManyLoraConfig
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MANYLORA"
    with pytest.raises(ValueError, match="use ManyLoraConfig for other methods"):
        config_type(method="lora_split")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    adapted("multilora").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    for load in (
        PeftConfig.from_pretrained,
        lambda path: PeftModel.from_pretrained(tiny_llama(), path),
    ):
        with pytest.raises(ValueError, match=r"format_version=99.*pip install -U manylora"):
            load(tmp_path)


@pytest.mark.parametrize("second", ["multilora", "hydralora"])
def test_adapters_are_added_switched_summed_disabled_and_deleted(second: str) -> None:
    model = adapted("hydralora")
    base, first_only = logits_of_base(), logits(model)
    add(model, "second", 1, second, r=4)
    assert torch.equal(logits(model), first_only)
    model.set_adapter("second")
    second_only = logits(model)
    assert not torch.equal(second_only, first_only)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".second." in name for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second_only)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact, x = copy.deepcopy(layer).double(), torch.randn(2, 5, 32).double()
    parts = []
    for active in ("default", "second", ["default", "second"]):
        exact.set_adapter(active)
        parts.append((exact(x) - exact.base_layer(x)).detach())
    torch.testing.assert_close(parts[2], parts[0] + parts[1], rtol=0, atol=1e-13)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first_only)
    assert not any(".second." in name for name in model.state_dict())
    assert list(layer.branches) == list(layer.scaling) == ["default"]


def test_an_adapter_is_loaded_beside_another(tmp_path: Path) -> None:
    other = adapted("multilora", seed=5)
    expected = logits(other)
    other.save_pretrained(tmp_path)
    model = adapted("hydralora")
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), expected)


def test_status_print_and_parameter_counts_work(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("hydralora", target_modules=["q_proj"])
    status = model.get_model_status()
    assert (status.peft_types, status.enabled, status.active_adapters) == (
        {"default": "MANYLORA"},
        True,
        ["default"],
    )
    assert status.num_adapter_layers == 2
    assert not status.merged_adapters
    assert model.get_layer_status()[0].name == "model.model.layers.0.self_attn.q_proj"
    assert status.trainable_params == 2 * (8 * 32 + 32 * 24 + 3 * 32)
    model.print_trainable_parameters()
    assert "trainable params: 2,240" in capsys.readouterr().out
    assert "manylora.ManyLoraLinear" in repr(model)
    assert "Factor(8, 32)" in repr(model)


@pytest.mark.parametrize("method", METHODS)
def test_transformers_own_adapter_methods_work(method: str, tmp_path: Path) -> None:
    expected = logits(adapted(method))
    model = tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(manylora.ManyLoraConfig(method=method, init_weights=False))
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits_of_base())
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path), adapter_name="here")
    assert loaded.active_adapters() == ["here"]
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("here")
    assert torch.equal(logits(loaded), expected)


def test_auto_peft_finds_the_base_model_by_itself(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    attach(base, method="hydralora", task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(base))
