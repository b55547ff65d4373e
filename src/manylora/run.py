"""A run folder: what training leaves, and how to read it back.

adapter_config.json, adapter_model.safetensors (and branch_selector.safetensors), recipe.yaml,
metrics.jsonl, scores.json, routing.json, summary.json, report.html, README.md, checkpoints/;
discovery/, where clusters of prompts are its tasks or gave its number of branches.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from manylora import __version__
from manylora.adapter.checking import WEIGHTS_FILE, check_config, file_inside
from manylora.adapter.config import ManyLoraConfig
from manylora.base import load_model, load_tokenizer, name_and_revision
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe

SUMMARY_FILE = "summary.json"
PACKAGES = ("torch", "peft", "transformers", "trl", "accelerate")


def load(run: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The trained model, in eval mode, and its tokenizer, from a run folder alone.

    Raises FileNotFoundError when the folder is not a finished run, AdapterFileError (a ValueError)
    when a file in it is damaged or not what it must be: before the base model is loaded.
    """
    folder = Path(run)
    recipe = recipe_of(folder)
    check_folder(folder)
    base = load_model(recipe.model, recipe.dtype, recipe.quantize)
    model = PeftModel.from_pretrained(base, str(folder))
    if torch.cuda.is_available() and recipe.quantize is None:
        model.to("cuda")
    return model.eval(), load_tokenizer(recipe.model)


def check_folder(folder: Path) -> ManyLoraConfig:
    """The configuration of an adapter folder whose files are all what they must be.

    Raises AdapterFileError, which names the file and what to do, and FileNotFoundError; nothing of
    the weights is read.
    """
    check_config(folder)
    config = ManyLoraConfig.from_pretrained(str(folder))
    if config.saved is None:
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE}: no such file; copy the whole folder")
    return config


def config_of(model: PeftModel, adapter: str = "default") -> ManyLoraConfig:
    """The configuration of a loaded adapter."""
    return cast(ManyLoraConfig, model.peft_config[adapter])


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a finished run.

    Raises FileNotFoundError when it is none; AdapterFileError when recipe.yaml leads out of it.
    """
    if (run / RECIPE_FILE).is_file() and not is_finished(run):
        raise FileNotFoundError(
            f"{run} is not a finished run; finish it with `manylora train {run} --resume`"
        )
    for name in (RECIPE_FILE, "adapter_config.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(
                f"{run} is not a finished run: {name} is missing; make one with "
                f"`manylora train RECIPE output={run}` or `manylora quickstart --output {run}`"
            )
    return load_recipe(file_inside(run, RECIPE_FILE))


def is_finished(run: Path) -> bool:
    """The adapter's configuration is the last file that a run writes."""
    return (run / RECIPE_FILE).is_file() and (run / "adapter_config.json").is_file()


def write_summary(
    folder: Path, model: PeftModel, recipe: Recipe, mixture: Sequence[Any], **measured: Any
) -> None:
    """summary.json: what was trained, on what, for how long."""
    trained, total = model.get_nb_trainable_parameters()
    device = model.device
    summary = {
        "method": config_of(model).method,
        "model": recipe.model,
        "trainable_parameters": trained,
        "total_parameters": total,
        "train_rows": sum(row["rows"] for row in mixture),
        "device": device_name(device),
        "peak_memory_bytes": peak_memory(device),
        "versions": versions(),
        "mixture": list(mixture),
        **measured,
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of manylora and of the packages that a result depends on."""
    return {"manylora": __version__, **{name: version(name) for name in PACKAGES}}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """What ran it, for people: the GPU's name, or the CPU's and how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = str(torch.cpu.get_capabilities().get("cpu_name") or "CPU").strip()
    return f"{name}, {torch.get_num_threads()} threads"


def write_card(folder: Path, recipe: Recipe, tasks: Sequence[str]) -> None:
    """README.md: the model card, with the import without which the adapter does not load."""
    config, name = recipe.config(len(tasks)), recipe.run.name
    (folder / "README.md").write_text(
        f"""---
base_model: {name_and_revision(recipe.model)[0]}
library_name: peft
tags: [manylora, {config.method}, multi-task, lora]
---

# {config.method} on {recipe.model}

A multi-branch LoRA adapter for {len(tasks)} tasks: {", ".join(tasks)}.

```python
import manylora  # registers the adapter's type with PEFT; without it loading ends in a KeyError

model, tokenizer = manylora.load("{name}")  # this folder
```

Or with PEFT alone, on a base model of your own:

```python
import manylora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{name}")
```

In programs that cannot be changed, `manylora autoload enable` takes the place of the import.

Scores before and after training are in `scores.json`, with pictures in `report.html`; the run is
repeated with `manylora train recipe.yaml output=NEW_FOLDER`.
""",
        encoding="utf-8",
    )
