"""A Transformers folder: the base model with one update in its weights, loaded without manylora.

    W' = W + dW, in float32, then rounded to the dtype that the base model is stored in

Of a token router dW is the better of its mean mixing weights and its fit (`static.py`).
The unrounded model is compared with the live run, and the folder, loaded in a process without
manylora, with the rounded model; what the rounding itself did is in the export's note.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from manylora.base import load_tokenizer, name_and_revision, resolve
from manylora.export.live import live_logits, logits_of, probe
from manylora.export.plans import Plan, chosen, load_exact, plans_of, require_unquantised
from manylora.export.record import Export, ExportError, record, require_close, written_whole
from manylora.export.static import better, compare
from manylora.plain_peft import PlainPeftError, model_logits
from manylora.recipe import Recipe
from manylora.run import recipe_of


@dataclass(frozen=True)
class Update:
    """Which of a run's updates to merge, and into what.

    task: which branch or task, for a run that has several updates. static: for a token router, the
    better of its mean mixing weights and its fit, of `task` or for all tasks; rows: of each task,
    to measure those on. base: another base model than the run's, as a quantised one's original.
    """

    task: str | None = None
    static: bool = False
    rows: int | None = None
    base: str | None = None


ONLY = Update()
"""The update of a run that has one."""


@dataclass(frozen=True)
class Merged:
    """A model with a plan's update in its float32 weights; tokens and logits to compare it by.

    recipe: the run's, with the base model that was merged into. about: what it is, in words.
    """

    model: PreTrainedModel
    plan: Plan
    gap: dict[str, list[float]]
    tokens: Tensor
    logits: Tensor
    recipe: Recipe
    about: str


def export_merged(
    run: Path,
    output: Path,
    update: Update = ONLY,
    console: Console | None = None,
    adapter: str = "default",
) -> list[Export]:
    """Write the merged model: weights, config, generation config, tokenizer and a model card.

    Raises ExportError as `merge`, and when the folder, loaded again, has other logits.
    """
    with written_whole(output) as partial:
        merged = merge(run, update, console, adapter)
        model, dtype = merged.recipe.model, stored_dtype(merged.recipe.model)
        rounding = round_to(merged, dtype)
        merged.model.to(dtype).save_pretrained(str(partial))  # type: ignore[arg-type]
        load_tokenizer(model).save_pretrained(str(partial))
        merged.model.float()
        try:
            loaded = model_logits(partial, merged.tokens)
        except PlainPeftError as error:
            raise ExportError(f"the merged folder does not load: {error}") from None
        rounded = logits_of(merged.model, merged.tokens)
        require_close("the merged folder, loaded again", far(loaded, rounded))
        difference = far(loaded, merged.logits)
        note = f"{merged.about}; {rounding}"
        (partial / "README.md").write_text(_card(merged, note), encoding="utf-8")
    done = Export(str(output), "merged", merged.plan.exact, difference, note, merged.gap)
    return record(run, [done])


def merge(
    run: Path, update: Update, console: Console | None = None, adapter: str = "default"
) -> Merged:
    """The run's model in float32, without an adapter and with one of its updates in its weights.

    Raises ExportError for several updates without a task, a base that is stored quantised, a token
    router without `static`, and when its logits are not those of the live run.
    """
    console, recipe = console or Console(stderr=True), recipe_of(run)
    model = load_exact(run, update.base)
    require_unquantised(run, model, adapter)
    gap: dict[str, list[float]] = {}
    if update.static:
        found = compare(run, model, adapter, None, update.rows, console, [update.task])
        (one,) = better(found)
        plan, gap = one.plan, one.gap
    else:
        plan = chosen(plans_of(run, model, adapter), update.task)
    about = f"{plan.note}{_about_base(recipe, update.base)}"
    if recipe.quantize is not None or update.base is not None:
        console.print(f"warning: {about}", style="yellow", markup=False)
    tokens = probe(model)
    live = live_logits(model, adapter, plan, tokens)
    for layer, delta in plan.deltas(model, adapter):
        layer.set_base_weight(layer.get_base_weight() + delta)
    merged = cast(PreTrainedModel, cast(BaseTuner, model.base_model).unload())
    require_close("the merged model", far(live, logits_of(merged, tokens)))
    recipe = recipe.model_copy(update={"model": update.base or recipe.model})
    return Merged(merged, plan, gap, tokens, live, recipe, about)


def _about_base(recipe: Recipe, base: str | None) -> str:
    """What a user has to know of a model that is merged into another base than was trained on."""
    if recipe.quantize is None and base is None:
        return ""
    trained = recipe.model if recipe.quantize is None else f"the base in {recipe.quantize}"
    return (
        f"; trained on {trained}, merged into {base or 'it'} unquantised, on which its answers "
        "differ a little; a LoRA (--to lora) is served on the base as it was trained on"
    )


def stored_dtype(model: str) -> torch.dtype:
    """What the base model's weights are stored in, as its config says; float32 where it doesn't."""
    dtype = AutoConfig.from_pretrained(resolve(model)).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@torch.no_grad()
def round_to(merged: Merged, dtype: torch.dtype) -> str:
    """Round the weights in place, still float32; what that did to the logits, in words."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        return "in float32, as the base"
    for parameter in merged.model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    moved = far(merged.logits, logits_of(merged.model, merged.tokens))
    if not torch.isfinite(torch.tensor(moved)):
        raise ExportError(f"the merged weights overflow in {name}; choose another with --dtype")
    spread = float(merged.logits.std())
    return f"rounding to {name} moved a logit by {moved:.1e} at most (their spread is {spread:.1f})"


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def _card(merged: Merged, note: str) -> str:
    recipe = merged.recipe
    method = recipe.config().method
    return f"""---
base_model: {name_and_revision(recipe.model)[0]}
library_name: transformers
tags: [manylora, {method}, merged]
---

# {recipe.run.name}: {method} merged into {recipe.model}

Made by `manylora export RUN --to merged` ({note}). It loads with Transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""
