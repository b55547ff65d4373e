"""HydraLoRA checkpoints of the authors' code: equal to their formula, and hostile ones refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from typer.testing import CliRunner

import manylora
from manylora.cli.importing import app
from manylora.importing.hydralora import import_hydralora
from manylora.importing.pickles import ImportFileError
from tiny import VOCAB, tiny_llama

N, R, ALPHA = 4, 3, 24
X = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LEAVES = ("gate_proj", "down_proj", "up_proj")
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "some/llama",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "lora_nums": N,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": R,
    "target_modules": list(LEAVES),
    "task_type": "CAUSAL_LM",
}


def their_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """By their names: lora_A, lora_B0.., lora_route of each projection of the MLPs."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    for name, module in tiny_llama().named_modules():
        if name.endswith(LEAVES):
            assert isinstance(module, nn.Linear)
            n_out, n_in = module.weight.shape
            shapes = {"lora_A": (R, n_in), "lora_route": (N, n_in)}
            shapes |= {f"lora_B{i}": (n_out, R) for i in range(N)}
            for part, shape in shapes.items():
                tensor = torch.randn(shape, generator=draw, dtype=torch.float64) / 4
                tensors[f"base_model.model.{name}.{part}.weight"] = tensor.to(dtype)
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    torch.save(their_tensors(), folder / "adapter_model.bin")
    return folder


def by_the_formula(tensors: dict[str, Tensor]) -> Tensor:
    """Logits of the tiny model with their layer written out, branch by branch, in float64."""
    model = tiny_llama(dtype=torch.float64)

    def formula(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        part = {k.split(".")[-2]: t for k, t in tensors.items() if f".{name}." in k}

        def forward(x: Tensor) -> Tensor:
            y = x @ linear.weight.T
            w = torch.softmax(x @ part["lora_route"].T, dim=-1)
            for i in range(N):
                h = x @ part["lora_A"].T
                y = y + ALPHA / R * w[..., i : i + 1] * (h @ part[f"lora_B{i}"].T)
            return y

        return forward

    for name, module in model.named_modules():
        if name.endswith(LEAVES):
            module.forward = formula(name, module)  # type: ignore[arg-type,assignment]
    return model(X).logits


def test_the_imported_adapter_is_their_formula(checkpoint: Path, tmp_path: Path) -> None:
    done = import_hydralora(checkpoint, tmp_path / "ours")
    assert (done.layers, done.branches, done.rank) == (6, N, R)
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = tiny_llama(dtype=torch.float64)
    plain = base(X).logits
    model = PeftModel.from_pretrained(base, str(done.folder), autocast_adapter_dtype=False)
    expected = by_the_formula(their_tensors())
    assert (expected - plain).norm() > 0.5 * plain.norm()
    assert torch.allclose(model(X).logits, expected, rtol=0, atol=1e-12)
    config = model.peft_config["default"]
    assert isinstance(config, manylora.ManyLoraConfig)
    assert config.dropout_per_branch
    assert config.base_model_name_or_path == "some/llama"


def test_another_base_model_can_be_named(checkpoint: Path, tmp_path: Path) -> None:
    assert import_hydralora(checkpoint, tmp_path / "ours", "my/llama").base_model == "my/llama"


class Evil:
    """What a pickle can do when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def refused(checkpoint: Path, match: str, file: str = "adapter_model.bin") -> None:
    """The import says what is wrong with which file, and leaves nothing."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(ImportFileError, match=match) as error:
        import_hydralora(checkpoint, checkpoint.parent / "ours")
    assert str(checkpoint / file) in str(error.value)
    assert sorted(checkpoint.parent.iterdir()) == before


def test_a_pickle_with_code_in_it_is_refused_and_not_executed(checkpoint: Path) -> None:
    witness = checkpoint.parent / "executed"
    torch.save({**their_tensors(), "x": Evil(witness)}, checkpoint / "adapter_model.bin")
    refused(checkpoint, "Nothing in it was executed")
    assert not witness.exists()
    with (checkpoint / "adapter_model.bin").open("rb") as file:  # it does run where nobody looks
        torch.load(file, weights_only=False)
    assert witness.is_dir()


def test_a_bare_pickle_is_refused(checkpoint: Path) -> None:
    witness = checkpoint.parent / "executed"
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps(Evil(witness)))
    refused(checkpoint, "is no torch file")
    assert not witness.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_a_truncated_file_is_refused(checkpoint: Path, keep: float) -> None:
    path = checkpoint / "adapter_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    refused(checkpoint, "truncated|damaged")


def changed(**change: Tensor | None) -> dict[str, Tensor]:
    tensors = their_tensors()
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    for name, tensor in change.items():
        key = f"{prefix}{name}.weight"
        del tensors[key]
        if tensor is not None:
            tensors[key] = tensor
    return tensors


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (changed(lora_B2=None), "up_proj has .* the file is incomplete"),
    "extra": (their_tensors() | {"x": torch.ones(2)}, "'x' is no tensor of HydraLoRA"),
    "shape": (changed(lora_B1=torch.ones(48, R + 1).double()), r"\(48, 4\), but by .*\(48, 3\)"),
    "rank": (changed(lora_A=torch.ones(R)), "lora_A.weight is"),
    "scalar": (changed(lora_B0=torch.tensor(1.0)), "lora_A.weight is|lora_B0.weight is"),
    "nan": (changed(lora_A=torch.full((R, 32), torch.nan)), "not finite"),
    "integers": (changed(lora_A=torch.ones(R, 32).int()), "floating-point"),
    "sparse": (changed(lora_A=torch.ones(R, 32).to_sparse()), "dense|tensors alone"),
    "repeated view": (changed(lora_A=torch.ones(1).expand(R, 32)), "more than the file holds"),
    "list": ([torch.ones(2)], "holds a list"),
    "number": ({"a": 1}, "'a' is a int"),
    "empty": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_are_refused(checkpoint: Path, kind: str) -> None:
    content, match = WRONG[kind]
    torch.save(content, checkpoint / "adapter_model.bin")
    refused(checkpoint, match)


def test_a_view_of_terabytes_is_refused_without_making_it(checkpoint: Path) -> None:
    view = torch.ones(1).expand(2**21, 2**21)
    torch.save(changed(lora_A=view), checkpoint / "adapter_model.bin")
    refused(checkpoint, "more than the file holds")


def test_a_zip_bomb_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.bin"
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    path.write_bytes(packed.getvalue())
    refused(checkpoint, "unpack to more")


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"r": 10**9}, "r: Input should be less than"),
    ({"r": "8"}, "r: Input should be a valid integer"),
    ({"lora_nums": 0}, "lora_nums"),
    ({"lora_alpha": float("nan")}, "lora_alpha: Input should be"),
    ({"target_modules": ["gate_proj"]}, "does not name model.layers.0.mlp.up_proj"),
    ({"target_modules": "("}, "target_modules: missing"),
    ({"target_modules": ".*attn.*"}, "does not name"),
    ({"bias": "all"}, "only adapters without these"),
    ({"modules_to_save": ["lm_head"]}, "only adapters without these"),
]


@pytest.mark.parametrize(("change", "match"), BAD_FIELDS, ids=[str(c) for c, _ in BAD_FIELDS])
def test_a_wrong_config_is_refused(checkpoint: Path, change: dict[str, Any], match: str) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps(CONFIG | change), encoding="utf-8")
    refused(checkpoint, match, "adapter_config.json")


def test_a_plain_lora_is_told_apart(checkpoint: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "lora_nums"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(checkpoint, "is this a HydraLoRA checkpoint", "adapter_config.json")


def test_a_folder_that_is_there_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--output"):
        import_hydralora(checkpoint, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes"]


def test_the_command_says_what_was_imported_and_what_is_wrong(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = CliRunner()
    done = run.invoke(app, ["import", str(checkpoint), "--output", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert f"6 layers, {N} branches of rank {R}, for some/llama" in done.output
    (checkpoint / "adapter_model.bin").write_bytes(b"?")
    done = run.invoke(app, ["import", str(checkpoint), "--output", str(tmp_path / "again")])
    assert isinstance(done.exception, ImportFileError)  # `main` prints it and exits with 1
    assert not (tmp_path / "again").exists()
