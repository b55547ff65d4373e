"""What serving engines accept of a plain LoRA, and the command lines that serve an export.

The rules were read in the engines' sources: vLLM `lora/peft_helper.py` and `config/lora.py`
(one scale alpha / r for all modules, patterns ignored; max_lora_rank one of `VLLM_RANKS`),
SGLang `lora_config.py`, llama.cpp `convert_lora_to_gguf.py` and `llama-adapter.h` (scale is alpha
over the rank of each tensor, rsLoRA ignored). None of the engines was run here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UNVERIFIED = "unverified: the engine was not run here"


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that takes a LoRA of this rank; None: it is above them all."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def config_problems(folder: Path) -> list[str]:
    """What an engine would refuse or compute wrongly in a PEFT LoRA folder; empty: nothing."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return [*_config_problems(config), *_tensor_problems(folder, config)]


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; engines load LORA alone")
    for name, why in (
        ("modules_to_save", "vLLM refuses it"),
        ("rank_pattern", "vLLM ignores it and sizes memory by r"),
        ("alpha_pattern", "vLLM and llama.cpp ignore it"),
        ("use_rslora", "llama.cpp ignores it"),
        ("use_dora", "vLLM refuses it"),
        ("layers_to_transform", "engines ignore it"),
        ("lora_bias", "engines have no such term"),
        ("trainable_token_indices", "engines have no such tensor"),
    ):
        if config.get(name):
            problems.append(f"{name}={config[name]!r}: {why}")
    if config.get("bias") not in (None, "none"):
        problems.append(f"bias={config['bias']!r}: vLLM refuses anything but none")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        problems.append(f"target_modules={targets!r}: engines want a list of module names")
    if config.get("lora_alpha") != config.get("r"):
        problems.append(
            f"lora_alpha={config.get('lora_alpha')} is not r={config.get('r')}: engines scale "
            "differently unless both are equal"
        )
    return problems


def _tensor_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    problems = []
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape = file.get_slice(name).get_shape()
            if name.endswith(".lora_A.weight"):
                rank = shape[0]
            elif name.endswith(".lora_B.weight"):
                rank = shape[1]
            else:
                problems.append(f"tensor {name}: vLLM and llama.cpp know lora_A and lora_B alone")
                continue
            if rank != config.get("r"):
                problems.append(f"tensor {name} has rank {rank}, not r={config.get('r')}")
    return problems


def command_lines(base: str, loras: Mapping[str, Path], rank: int) -> list[str]:
    """Command lines that serve plain LoRA folders, by name, with one engine each.

    base: folder or hub name of the base model, as Transformers loads it.
    """
    model = shlex.quote(base)
    pairs = [shlex.quote(f"{name}={path}") for name, path in loras.items()]
    together, commas = " ".join(pairs), shlex.quote(",".join(f"{n}={p}" for n, p in loras.items()))
    allowed = vllm_rank(rank)
    vllm = f"vllm serve {model} --enable-lora --max-loras {len(loras)} --max-lora-rank {allowed} "
    if allowed is None:
        vllm = f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is {rank}: use --to merged"
    else:
        vllm += f"--lora-modules {together}"
    ggufs = " ".join(f"--lora {shlex.quote(f'{name}.gguf')}" for name in loras)
    return [
        _line("vLLM", vllm),
        _line(
            "SGLang",
            f"python -m sglang.launch_server --model-path {model} --enable-lora "
            f"--max-loras-per-batch {len(loras) + 1} --max-lora-rank {rank} "
            f"--lora-paths {together}",
        ),
        _line("TGI", f"text-generation-launcher --model-id {model} --lora-adapters {commas}"),
        _line(
            "llama.cpp",
            f"llama-server -m BASE.gguf --lora-init-without-apply {ggufs}   # each .gguf by "
            "`manylora export RUN --to gguf-lora` or llama.cpp's convert_lora_to_gguf.py",
        ),
    ]


def _line(engine: str, command: str) -> str:
    return f"{engine} ({UNVERIFIED}):\n  {command}"
