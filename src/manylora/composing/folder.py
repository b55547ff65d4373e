"""What `compose` leaves, whole or not at all: adapter_config.json is written last.

DIR/adapter_config.json, adapter_model.safetensors   one plain LoRA, for PEFT alone
DIR/compose.json                                     weights, every trial, settings, versions
DIR/scores.json                                      held-out rows before (base model) and after
DIR/README.md                                        the model card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from manylora import __version__
from manylora.composing.few_shot import FewShot
from manylora.composing.search import Trial, best_of
from manylora.composing.updates import CONFIG_FILE, AdapterFolder
from manylora.run import PACKAGES
from manylora.training.checkpoints import new_partial, publish_files

COMPOSE_FILE = "compose.json"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, whose files are moved to `output` when all of them are there."""
    output.mkdir(parents=True, exist_ok=True)
    partial = new_partial(output / COMPOSE_FILE)
    try:
        yield partial
        publish_files(partial, output, last=CONFIG_FILE)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # not empty: files were being moved
            output.rmdir()
        raise


def write_record(
    folder: Path,
    settings: Mapping[str, object],
    adapters: Sequence[AdapterFolder],
    data: FewShot,
    trials: Sequence[Trial],
) -> None:
    """compose.json: what is needed to judge the weights and to find them again."""
    best = best_of(trials)
    record = {
        **settings,
        "adapters": [
            {"path": str(adapter.path.resolve()), "weight": weight}
            for adapter, weight in zip(adapters, best.weights, strict=True)
        ],
        "task": data.task,
        "examples": [shot.source for shot in data.shots],
        "held_out_rows": data.scored,
        "best": best.plain(),
        "trials": [trial.plain() for trial in trials],
        "versions": {
            "manylora": __version__,
            **{name: version(name) for name in (*PACKAGES, "nevergrad")},
        },
    }
    (folder / COMPOSE_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")


def write_card(
    folder: Path,
    name: str,
    model: str,
    task: str,
    adapters: Sequence[AdapterFolder],
    best: Trial,
) -> None:
    """README.md: how to load it, and what it was made of."""
    rows = "\n".join(
        f"| {'/'.join(adapter.path.resolve().parts[-2:])} | {weight:+.4f} |"
        for adapter, weight in zip(adapters, best.weights, strict=True)
    )
    (folder / "README.md").write_text(
        f"""---
base_model: {model}
library_name: peft
tags: [lora, lorahub, manylora]
---

# {task}: {len(adapters)} adapters as one

A plain LoRA on {model}, composed by `manylora compose` (LoraHub, arXiv 2307.13269). It loads
without manylora:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{name}")
```

| adapter | weight |
|---|---|
{rows}

Scores on held-out rows before and after are in `scores.json`; every weight that was tried, the
examples, the seed and the versions in `compose.json`.
""",
        encoding="utf-8",
    )


def print_weights(folder: Path, console: Console) -> None:
    """The weight that each adapter got, and what the search gained on its examples."""
    record = json.loads((folder / COMPOSE_FILE).read_text(encoding="utf-8"))
    for adapter in record["adapters"]:
        line = f"{adapter['weight']:+.3f}  {adapter['path']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    first, best = record["trials"][0], record["best"]
    console.print(
        f"NLL of the {len(record['examples'])} examples: {first['nll']:.3f} nats/token before, "
        f"{best['nll']:.3f} with these weights",
        highlight=False,
    )
