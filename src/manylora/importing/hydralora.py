"""HydraLoRA checkpoints of the authors' code, as manylora adapter folders.

What their code saves for each adapted layer (2404.19245, its section 3 and the released code):
lora_A.weight (r x in), lora_B0.weight .. lora_B{N-1}.weight (out x r), lora_route.weight (N x in),
in adapter_model.bin beside an adapter_config.json with `lora_nums`, and what it computes with them

    y = W x + (alpha / r) * SUM_i softmax(lora_route x)_i * lora_B_i lora_A dropout(x)

which is the row "hydralora" here: manylora_B is [B_0 | .. | B_{N-1}], manylora_router lora_route.
Their dropout draws a mask for each branch: `dropout_per_branch`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapter.checking import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, file_inside
from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.saved_config import Alpha, Rank, check_patterns
from manylora.importing.pickles import ImportFileError, read_tensors
from manylora.methods import MOST_BRANCHES

_ROOT = "base_model.model."
_TENSOR = re.compile(r"(?P<layer>[\w\-]+(?:\.[\w\-]+)*)\.lora_(?P<part>A|B\d{1,4}|route)\.weight")
_MOST_BYTES = 2**20


class _TheirConfig(BaseModel):
    """The fields of their adapter_config.json that change what is computed."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: Alpha
    lora_nums: Annotated[int, Field(ge=1, le=MOST_BRANCHES)]
    target_modules: list[str] | str
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    base_model_name_or_path: str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Imported:
    """What was written: the folder, and how many layers of how many branches and what rank."""

    folder: Path
    layers: int
    branches: int
    rank: int
    base_model: str | None


def import_hydralora(source: Path, output: Path, base_model: str | None = None) -> Imported:
    """Write the checkpoint in the folder `source` as the manylora adapter folder `output`.

    base_model: the base model to name, where it is not where their file says it is.

    Raises ImportFileError or AdapterFileError when a file is not what it must be (nothing in it is
    executed, and nothing is written), FileNotFoundError, FileExistsError.
    """
    theirs = _read_config(file_inside(source, CONFIG_FILE))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; give a new folder with --output")
    weights = file_inside(source, PICKLE_FILE)
    layers = _by_layer(weights, read_tensors(weights), theirs)
    _check_targets(source / CONFIG_FILE, theirs.target_modules, list(layers))
    config = ManyLoraConfig(
        method="hydralora",
        r=theirs.r,
        num_branches=theirs.lora_nums,
        lora_alpha=theirs.lora_alpha,
        lora_dropout=theirs.lora_dropout,
        dropout_per_branch=theirs.lora_dropout > 0,
        target_modules=theirs.target_modules,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model or theirs.base_model_name_or_path,
    )
    _write(output, config, layers)
    base = config.base_model_name_or_path
    return Imported(output, len(layers), theirs.lora_nums, theirs.r, base)


def _read_config(path: Path) -> _TheirConfig:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are no adapter's configuration")
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs = _TheirConfig.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        hint = ": is this a HydraLoRA checkpoint?" if where == "lora_nums" else ""
        raise ImportFileError(f"{path}: {where}: {first['msg']}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{path}: cannot be read as JSON: {str(error)[:200]}") from None
    if theirs.bias != "none" or theirs.modules_to_save or theirs.fan_in_fan_out:
        raise ImportFileError(
            f"{path}: bias={theirs.bias!r}, modules_to_save={theirs.modules_to_save}, "
            f"fan_in_fan_out={theirs.fan_in_fan_out}: only adapters without these are imported"
        )
    return theirs


def _by_layer(
    path: Path, tensors: dict[str, Tensor], theirs: _TheirConfig
) -> dict[str, dict[str, Tensor]]:
    """Layer -> part (A, B, router) -> tensor, as manylora holds them."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(_ROOT))
        if match is None:
            raise ImportFileError(
                f"{path}: {name[:120]!r} is no tensor of HydraLoRA (lora_A, lora_B0.., lora_route)"
            )
        found.setdefault(match["layer"], {})[match["part"]] = tensor
    if not found:
        raise ImportFileError(f"{path}: holds no tensors")
    return {layer: _stacked(path, layer, parts, theirs) for layer, parts in found.items()}


def _check_targets(path: Path, targets: list[str] | str, layers: list[str]) -> None:
    """The names of their configuration are those of the layers, as PEFT matches them."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ImportFileError(f"{path}: target_modules: {error}") from None
        check_patterns(path, [targets], layers)
        left = [layer for layer in layers if not re.fullmatch(targets, layer)]
    else:
        left = [layer for layer in layers if not f".{layer}".endswith(_dotted(targets))]
    if left:
        raise ImportFileError(
            f"{path}: target_modules={repr(targets)[:200]} does not name {left[0]}, which "
            f"{PICKLE_FILE} has tensors for: the two files are not of one adapter"
        )


def _dotted(names: list[str]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


def _stacked(
    path: Path, layer: str, parts: dict[str, Tensor], theirs: _TheirConfig
) -> dict[str, Tensor]:
    n, r = theirs.lora_nums, theirs.r
    names = ["A", *(f"B{i}" for i in range(n)), "route"]
    if set(parts) != set(names):
        raise ImportFileError(
            f"{path}: {layer} has {', '.join(sorted(parts)[:8])}, but with lora_nums={n} it has "
            f"{', '.join(names[:8])}: the file is incomplete or not of this {CONFIG_FILE}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    n_in, n_out = shapes["A"][-1:], shapes["B0"][:1]
    wanted = {"A": (r, *n_in), "route": (n, *n_in)} | {f"B{i}": (*n_out, r) for i in range(n)}
    wrong = next((name for name in names if shapes[name] != wanted[name]), None)
    if wrong is not None:
        raise ImportFileError(
            f"{path}: {layer}.lora_{wrong}.weight is {shapes[wrong]}, but by {CONFIG_FILE} "
            f"{wanted[wrong]}: the two files are not of one adapter"
        )
    ups = [parts[f"B{i}"] for i in range(n)]
    return {"A": parts["A"], "B": torch.cat(ups, dim=1), "router": parts["route"]}


def _write(output: Path, config: ManyLoraConfig, layers: dict[str, dict[str, Tensor]]) -> None:
    """All of the folder or nothing: written beside it, checked, and moved there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        config.save_pretrained(str(partial))
        tensors = {
            f"{_ROOT}{layer}.manylora_{part}.weight": tensor.contiguous()
            for layer, parts in layers.items()
            for part, tensor in parts.items()
        }
        save_file(tensors, str(partial / WEIGHTS_FILE), metadata={"format": "pt"})
        (partial / "README.md").write_text(_card(output.name, config), encoding="utf-8")
        ManyLoraConfig.from_pretrained(str(partial))  # what is checked when it is loaded
        partial.chmod(0o755)
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _card(name: str, config: ManyLoraConfig) -> str:
    base: Any = json.dumps(config.base_model_name_or_path)
    return f"""---
base_model: {base}
library_name: peft
tags: [manylora, hydralora, lora]
---

# HydraLoRA, from a checkpoint of the authors' code

{config.num_branches} branches of rank {config.r}, imported by `manylora import`.

```python
import manylora  # registers the adapter's type with PEFT; without it loading ends in a KeyError
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{name}")
```
"""
