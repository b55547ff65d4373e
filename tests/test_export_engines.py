"""The rules of serving engines, and the command lines that serve an export."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.export import ExportError, export_lora, lora
from manylora.export.engines import UNVERIFIED, command_lines, config_problems, vllm_rank
from manylora.recipe import Recipe
from manylora.train import train

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA that breaks no rule."""
    folder = tmp_path_factory.mktemp("lora")
    write(folder, {})
    return folder


def write(folder: Path, changes: dict[str, Any], *, rank: int = 4, extra: str = "") -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none"}
    config |= {"target_modules": ["q_proj"]} | changes
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {f"{name}lora_A.weight": torch.ones(rank, 8)}
    tensors[f"{name}lora_B.weight"] = torch.ones(8, rank)
    if extra:
        tensors[extra] = torch.ones(2)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (24, 32), (48, 64), (257, 320), (512, 512), (513, None)]
)
def test_rank_is_served_with_the_next_one_that_vllm_allows(rank: int, allowed: int | None) -> None:
    assert vllm_rank(rank) == allowed


def test_plain_lora_breaks_no_rule(folder: Path) -> None:
    assert config_problems(folder) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "MANYLORA"}, "peft_type"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_alpha": 8}, "lora_alpha=8"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"r": 8, "lora_alpha": 8}, "has rank 4, not r=8"),
    ],
)
def test_each_broken_rule_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    problems = config_problems(write(tmp_path / "lora", changes))
    assert any(message in problem for problem in problems), problems


def test_tensors_that_are_no_factors_are_named(tmp_path: Path) -> None:
    problems = config_problems(write(tmp_path / "lora", {}, extra="manylora_router.weight"))
    assert len(problems) == 1 and "manylora_router.weight" in problems[0]


def test_every_engine_gets_every_lora_at_its_rank_and_is_marked(tmp_path: Path) -> None:
    loras = {"legal cases": tmp_path / "legal cases", "code": tmp_path / "code"}
    lines = command_lines("owner/base", loras, 24)
    assert [line.split(" ")[0] for line in lines] == ["vLLM", "SGLang", "TGI", "llama.cpp"]
    assert all(UNVERIFIED in line for line in lines)
    vllm, sglang, tgi, llama = [line.split("\n")[1] for line in lines]
    words = shlex.split(vllm)
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--max-loras") + 1] == "2"
    assert f"legal cases={loras['legal cases']}" in words and f"code={loras['code']}" in words
    assert "--max-lora-rank 24" in sglang and f"code={loras['code']}" in shlex.split(sglang)
    assert shlex.split(tgi)[-1].split(",")[1] == f"code={loras['code']}"
    assert shlex.split(llama, comments=True).count("--lora") == 2


def test_a_rank_above_what_vllm_takes_is_said(tmp_path: Path) -> None:
    vllm = command_lines("owner/base", {"big": tmp_path}, 600)[0]
    assert "up to 512" in vllm and "--to merged" in vllm and "serve" not in vllm


def test_an_export_that_breaks_a_rule_leaves_nothing(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))
    right = lora.write_lora

    def renamed(*arguments: Any) -> None:
        right(*arguments)
        path = arguments[-1] / "adapter_model.safetensors"
        tensors = {name.replace("lora_A", "lora_X"): t for name, t in load_file(path).items()}
        save_file(tensors, str(path))

    monkeypatch.setattr(lora, "write_lora", renamed)
    with pytest.raises(ExportError, match=r"engines would refuse it: tensor .*lora_X"):
        export_lora(run, tmp_path / "out" / "here")
    assert list((tmp_path / "out").iterdir()) == []
    assert not (run / "exports.json").exists()
