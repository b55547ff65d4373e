"""Merging where a base is quantised: into the unquantised one, with a word, or an error."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import manylora
from manylora.adapter.layer import layers_of
from manylora.export import ExportError, export_lora
from manylora.export.gguf_files import export_gguf, export_gguf_lora
from manylora.export.live import fixed
from manylora.export.merged import Update, export_merged
from manylora.export.plans import Plan, load_exact
from manylora.recipe import parse_recipe
from tiny import save_tiny_model
from tiny_packed import pack, take_for_gptqmodel

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantised model."""
    return save_tiny_model(tmp_path_factory.mktemp("original"), **SIZES)


@pytest.fixture(scope="module", params=[4, 8])
def stored(
    request: pytest.FixtureRequest, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model, saved quantised with bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("stored") / f"{request.param}bit"
    shutil.copytree(original, folder)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**four if request.param == 4 else {"load_in_8bit": True})
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(
        original, quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def make_run(run: Path, original: Path, base: Path, method: str, **recipe: Any) -> Path:
    """A finished run on `base`, of random weights."""
    run.mkdir()
    values = {"model": str(base), "data": "samples", "adapter": {"r": 4, "method": method}}
    resolved = parse_recipe({**values, "output": str(run), **recipe})
    config = resolved.config(1)
    config.init_weights = False
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(original), config)
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(base)
    resolved.save(run)
    model.save_pretrained(str(run))
    return run


def merged_weight(original: Path, run: Path) -> torch.Tensor:
    """W + dW of one layer, from the layer itself."""
    model = load_exact(run, str(original))
    (layer,) = [layer for layer in layers_of(model) if layer.name == LAYER]
    return layer.get_base_weight() + layer.get_delta_weight("default")


def test_run_that_quantised_its_base_merges_into_the_unquantised_one_and_says_so(
    original: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", original, original, "multilora", quantize="4bit")
    said = io.StringIO()
    (done,) = export_merged(run, tmp_path / "out", console=Console(file=said, width=1000))
    assert "warning: the whole adapter; trained on the base in 4bit" in said.getvalue()
    assert "merged into it unquantised" in done.note and "--to lora" in done.note
    saved = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.weight"]
    torch.testing.assert_close(saved, merged_weight(original, run))
    plain = make_run(tmp_path / "plain", original, original, "multilora")
    said = io.StringIO()
    (done,) = export_merged(plain, tmp_path / "other", console=Console(file=said))
    assert not said.getvalue() and "unquantised" not in done.note


def test_base_that_is_stored_quantised_takes_no_merge_and_the_better_ways_work(
    original: Path, stored: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", original, stored, "multilora")
    before = sorted(path.name for path in tmp_path.iterdir())
    words = rf"stored quantised .*bnb {stored.name}.*--to lora.*unquantised model .*--base"
    for export in (export_merged, export_gguf, export_gguf_lora):
        with pytest.raises(ExportError, match=words):
            export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (lora,) = export_lora(run, tmp_path / "lora")
    assert lora.exact and lora.max_logit_difference < 1e-3
    said = io.StringIO()
    update = Update(base=str(original))
    (done,) = export_merged(run, tmp_path / "out", update, Console(file=said, width=1000))
    assert done.exact and f"trained on {stored}, merged into {original} unquantised" in done.note
    assert done.note.split(";")[1] in said.getvalue()
    saved = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.weight"]
    torch.testing.assert_close(saved, merged_weight(original, run))
    assert f"base_model: {original}" in (tmp_path / "out" / "README.md").read_text()


def test_static_updates_are_compared_on_a_quantised_base(
    original: Path, stored: Path, tmp_path: Path
) -> None:
    """Their update is computed beside the base, into which nothing could be put."""
    model = load_exact(make_run(tmp_path / "run", original, stored, "hydralora"))
    tokens = torch.arange(3, 23).reshape(1, 20)
    even = {layer.name: torch.full((3,), 1 / 3) for layer in layers_of(model)}
    (layer,) = [layer for layer in layers_of(model) if layer.name == LAYER]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fixed(model, "default", Plan("mean", even, None, False, "")):
        got = layer(x) - layer.base_layer(x)
        fixed_logits = model(input_ids=tokens).logits
    expected = x @ layer.get_delta_weight("default", even[LAYER]).T
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert (model(input_ids=tokens).logits - fixed_logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_layers_that_only_compute_take_no_merge(
    kind: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", original, original, "multilora")
    take_for_gptqmodel(monkeypatch)

    def load(*_: object) -> torch.nn.Module:
        return pack(AutoModelForCausalLM.from_pretrained(original), kind)

    monkeypatch.setattr("manylora.export.plans.load_model", load)
    with pytest.raises(ExportError, match=rf"stored quantised .*: {kind}\): an update .*--to lora"):
        export_merged(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert manylora.load(run)  # the run itself is as it was
