"""Adapter folders that are damaged, tampered with, or for another model: one error that says so."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import manylora
from folder_check import KINDS, base_model, make_adapter
from folder_fuzzing import CONFIG, PICKLE, SELECTOR, WEIGHTS, Raises
from manylora.adapter.saved_config import AdapterFileError
from manylora.importing.hydralora import import_hydralora
from tiny import VOCAB, attach, tiny_llama

X = torch.arange(3, 12)[None] % VOCAB


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter folder of each kind, not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    return {kind: make_adapter(kind, folder / kind) for kind in KINDS}


@pytest.fixture
def run(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the HydraLoRA run, to be damaged."""
    return Path(shutil.copytree(sources["hydralora"], tmp_path / "run"))


def by_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_model(), str(folder))


def set_fields(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), encoding="utf-8")


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"r": 10**9}, "r=1000000000: Input should be less than or equal to 65536"),
    ({"r": 60_000}, "has A .* but by adapter_config.json it has A 60000x"),
    ({"rank_pattern": {"k_proj": 60_000}}, "k_proj has A .* it has A 60000x16"),
    ({"r": "8"}, "r='8': Input should be a valid integer"),
    ({"r": True}, "r=True: Input should be a valid integer"),
    ({"lora_alpha": float("nan")}, "is not JSON .NaN is not a number"),
    ({"lora_alpha": 1e300}, "lora_alpha=1e.300"),
    ({"lora_dropout": -1}, "lora_dropout=-1"),
    ({"method": "other"}, "unknown method='other'; known methods: lora"),
    ({"gate": "other"}, "unknown gate='other'"),
    ({"method": "multilora"}, "but by adapter_config.json it has"),
    ({"num_branches": 2}, "but by adapter_config.json it has"),
    ({"lora_alfa": 4}, "unknown field 'lora_alfa'; did you mean 'lora_alpha'"),
    ({"target_modules": "("}, "is no regular expression"),
    ({"layers_pattern": ["("], "layers_to_transform": [0]}, "is no regular expression"),
    ({"format_version": 99}, "newer than the 1 that this manylora reads"),
    ({"selector": True}, "branch_selector.safetensors is not beside"),
    ({"modules_to_save": ["lm_head"]}, "holds nothing for modules_to_save='lm_head'"),
    ({"trainable_token_indices": [3]}, "holds nothing for trainable_token_indices"),
    ({"target_modules": ["nothing"]}, r"no linear layer matches target_modules=\['nothing'\]"),
    ({"task_type": "OTHER"}, "Invalid task type"),
]


@pytest.mark.parametrize(("fields", "match"), FIELDS, ids=[str(f)[:40] for f, _ in FIELDS])
def test_a_configuration_that_does_not_fit_is_refused(
    run: Path, fields: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.run.load_model", lambda *_: base_model())
    set_fields(run, **fields)
    for load in (manylora.load, by_peft):
        with pytest.raises(ValueError, match=match) as error:
            load(run)
        assert str(run) in str(error.value)


def test_fields_of_a_newer_peft_that_ask_for_nothing_are_let_pass(run: Path) -> None:
    set_fields(run, something_new=None, another=False)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        by_peft(run)


def test_a_pattern_that_never_ends_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.adapter.saved_config.SECONDS_FOR_PATTERNS", 1.0)
    set_fields(run, target_modules="(.+)+(.+)+(.+)+(.+)+!")
    with pytest.raises(AdapterFileError, match="does not end within 1 s; write the names out"):
        by_peft(run)


def test_a_pattern_with_several_repetitions_still_loads(tmp_path: Path) -> None:
    model = attach(base_model(), target_modules=r".*\.layers\.\d+\..*_proj", init_weights=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(by_peft(tmp_path)(X).logits, model.eval()(X).logits)


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS
) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


NAME = "base_model.model.model.layers.0.mlp.up_proj.manylora_B.weight"
ROUTER = NAME.replace("_B.", "_router.")
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a part is missing": (lambda t: t.pop(ROUTER), "up_proj has A .* but by .* it has .* router"),
    "A is missing": (lambda t: t.pop(NAME.replace("_B.", "_A.")), "needs matrices A and B"),
    "a layer is missing": (
        lambda t: [t.pop(key) for key in list(t) if ".up_proj." in key],
        "no tensor for .*up_proj.*; it is for another base model",
    ),
    "a layer too many": (
        lambda t: t.update(
            {k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items() if "up_proj" in k}
        ),
        "a tensor too many: .*layers.9",
    ),
    "a foreign tensor": (lambda t: t.update(x=torch.ones(2)), "'x' is no tensor of this adapter"),
    "a name with ..": (
        lambda t: t.update({"../../x.manylora_A.weight": torch.ones(2, 2)}),
        "'../../x.manylora_A.weight' is no tensor of this adapter",
    ),
    "another shape": (lambda t: t.update({NAME: torch.ones(24, 5)}), "B 24x5, .* B 24x9"),
    "no matrix": (lambda t: t.update({NAME: torch.ones(24)}), "needs matrices A and B"),
    "integers": (lambda t: t.update({NAME: torch.ones(24, 9).int()}), "is of type I32"),
    "not finite": (
        lambda t: t.update({NAME: torch.full((24, 9), torch.nan)}),
        "holds numbers that are not finite",
    ),
    "nothing": (lambda t: t.clear(), "holds no tensor of a manylora adapter"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_wrong_tensors_are_refused(run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, match = TENSORS[kind]
    change_tensors(run, change)
    monkeypatch.setattr("manylora.run.load_model", lambda *_: base_model())
    for load in (manylora.load, by_peft):
        with pytest.raises(AdapterFileError, match=match) as error:
            load(run)
        assert str(run / WEIGHTS) in str(error.value)


def test_ranks_that_the_model_cannot_hold_are_refused_before_they_are_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file of great rank, for layers of one input and one output, on a wider model."""
    folder = make_adapter("hydralora", tmp_path / "run")
    rank = 2**16
    set_fields(folder, r=rank, rank_pattern={}, num_branches=1)
    one = torch.zeros
    layers = {key.rpartition(".manylora_")[0] for key in load_file(folder / WEIGHTS)}
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.manylora_A.weight"] = one(rank, 1, dtype=torch.float16)
        tensors[f"{layer}.manylora_B.weight"] = one(1, rank, dtype=torch.float16)
        tensors[f"{layer}.manylora_router.weight"] = one(1, 1, dtype=torch.float16)
    save_file(tensors, folder / WEIGHTS)
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr("manylora.adapter.layer.Factor", lambda *shape: made.append(shape))
    with pytest.raises(AdapterFileError, match=r"would take 2,.* parameters for .* of 16 x 16"):
        by_peft(folder)
    assert not made


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(run: Path, keep: float) -> None:
    whole = (run / WEIGHTS).read_bytes()
    (run / WEIGHTS).write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    for load in (manylora.load, by_peft):
        with pytest.raises(AdapterFileError, match="is damaged or no safetensors file"):
            load(run)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "recipe.yaml"])
@pytest.mark.parametrize("target", ["/dev/zero", "../other"])
def test_a_link_out_of_the_folder_is_not_followed(run: Path, name: str, target: str) -> None:
    shutil.move(run / name, run.parent / "other")
    (run / name).symlink_to(target)
    with pytest.raises((AdapterFileError, FileNotFoundError)) as error:
        manylora.load(run)
    expected = "not a finished run" if target == "/dev/zero" and name != WEIGHTS else "leads out of"
    assert expected in str(error.value)


def test_links_within_the_folder_and_in_the_hubs_cache_are_followed(run: Path) -> None:
    (run / WEIGHTS).rename(run / "weights")
    (run / WEIGHTS).symlink_to("weights")
    by_peft(run)
    snapshot = run.parent / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(run, snapshot, symlinks=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "weights").rename(snapshot.parent.parent / "blobs" / "abc")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../blobs/abc")
    by_peft(snapshot)


def test_a_pickle_is_not_opened(run: Path) -> None:
    (run / WEIGHTS).unlink()
    torch.save({"x": Raises(run.parent / "executed")}, run / PICKLE)
    for load in (manylora.load, by_peft):
        with pytest.raises(AdapterFileError, match=r"adapter_model.bin: a pickle, which is not"):
            load(run)
    assert not (run.parent / "executed").exists()


def test_missing_weights_are_named(run: Path) -> None:
    (run / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}: no such file; copy the whole"):
        manylora.load(run)


def test_a_damaged_selector_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "holds .* but a selector of 3 branches is": lambda t: t.pop("mean"),
        "holds .*idf 63": lambda t: t.update(idf=t["idf"][1:]),
        "not finite": lambda t: t.update(mean=t["mean"] * torch.nan),
        "have no names": lambda t: None,  # written anew, without them
    }
    for number, (match, change) in enumerate(changes.items()):
        folder = Path(shutil.copytree(sources["branch_per_cluster"], tmp_path / str(number)))
        change_tensors(folder, change, SELECTOR)
        with pytest.raises(AdapterFileError, match=match) as error:
            by_peft(folder)
        assert str(folder / SELECTOR) in str(error.value)


def test_an_adapter_for_another_base_model_is_refused(run: Path) -> None:
    set_fields(run, base_model_name_or_path="its/own")
    wider = tiny_llama(hidden_size=32, intermediate_size=24, num_hidden_layers=1)
    with pytest.raises(AdapterFileError, match=r"another base model .*it names 'its/own'"):
        PeftModel.from_pretrained(wider, str(run))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    set_fields(run, target_modules=names)
    deeper = tiny_llama(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    with pytest.raises(AdapterFileError, match=r"no tensor for .*layers.1.*another base model"):
        PeftModel.from_pretrained(deeper, str(run))


def test_a_second_adapter_that_is_refused_is_taken_off_again(run: Path, tmp_path: Path) -> None:
    model = by_peft(run)
    before = model(X).logits
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    change_tensors(damaged, lambda t: t.update({NAME: t[NAME] * torch.nan}))
    with pytest.raises(AdapterFileError, match="not finite"):
        model.load_adapter(str(damaged), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(X).logits, before)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    attach(base_model(), trainable_token_indices=[1, 2]).save_pretrained(tmp_path)
    by_peft(tmp_path)
    set_fields(tmp_path, trainable_token_indices=[1, VOCAB])
    with pytest.raises(AdapterFileError, match=f"names token {VOCAB}, but the model has {VOCAB};"):
        by_peft(tmp_path)


def test_another_name_of_fitting_shapes_is_warned_of(run: Path) -> None:
    base = base_model()
    base.config._name_or_path = "/models/Llama-A"
    for name, warned in (("hub/llama-a", False), ("hub/llama-b", True), (None, False)):
        set_fields(run, base_model_name_or_path=name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(base_model().__class__(base.config), str(run))
        said = [str(w.message) for w in caught if "was trained on" in str(w.message)]
        assert bool(said) == warned


def test_a_loaded_configuration_can_still_start_an_adapter_on_another_model(run: Path) -> None:
    """It is the weights that are for one model alone."""
    from peft import get_peft_model

    config = manylora.ManyLoraConfig.from_pretrained(str(run))
    wider = tiny_llama(hidden_size=64, intermediate_size=48, num_hidden_layers=2)
    model = get_peft_model(wider, config)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.in_features == 64


def test_import_refuses_a_manylora_adapter(run: Path) -> None:
    with pytest.raises(ValueError, match="is this a HydraLoRA checkpoint"):
        import_hydralora(run, run.parent / "imported")
