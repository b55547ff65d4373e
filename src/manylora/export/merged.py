"""A Transformers folder: the base model with one update in its weights, loaded without manylora.

    W' = W + dW, in float32, then rounded to the dtype that the base model is stored in

The unrounded model is compared with the live run, and the folder, loaded in a process without
manylora, with the rounded model; what the rounding itself did is in the export's note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from manylora.base import load_tokenizer, name_and_revision, resolve
from manylora.export.live import live_logits, logits_of, probe
from manylora.export.plans import Plan, chosen, load_exact, plans_of
from manylora.export.record import Export, ExportError, record, require_close, written_whole
from manylora.plain_peft import PlainPeftError, model_logits
from manylora.recipe import Recipe
from manylora.run import recipe_of


@dataclass(frozen=True)
class Merged:
    """A model with a plan's update in its float32 weights; tokens and logits to compare it by."""

    model: PreTrainedModel
    plan: Plan
    tokens: Tensor
    logits: Tensor


def export_merged(
    run: Path,
    output: Path,
    task: str | None = None,
    static: bool = False,
    adapter: str = "default",
) -> list[Export]:
    """Write the merged model: weights, config, generation config, tokenizer and a model card.

    task: which branch or task, for a run that has several updates. static: for a token router, its
    weights fixed at their measured mean (of `task`, or over all tasks).

    Raises ExportError as `export_lora`, and for several updates without a `task`.
    """
    recipe = recipe_of(run)
    with written_whole(output) as partial:
        merged = merge(run, task, static, adapter)
        dtype = stored_dtype(recipe.model)
        rounding = round_to(merged, dtype)
        merged.model.to(dtype).save_pretrained(str(partial))  # type: ignore[arg-type]
        load_tokenizer(recipe.model).save_pretrained(str(partial))
        merged.model.float()
        try:
            loaded = model_logits(partial, merged.tokens)
        except PlainPeftError as error:
            raise ExportError(f"the merged folder does not load: {error}") from None
        rounded = logits_of(merged.model, merged.tokens)
        require_close("the merged folder, loaded again", far(loaded, rounded))
        difference = far(loaded, merged.logits)
        note = f"{merged.plan.note}; {rounding}{about_base(recipe)}"
        (partial / "README.md").write_text(_card(recipe, merged, note), encoding="utf-8")
    return record(run, [Export(str(output), "merged", merged.plan.exact, difference, note)])


def merge(run: Path, task: str | None, static: bool, adapter: str = "default") -> Merged:
    """The run's model in float32, without an adapter and with one of its updates in its weights.

    Raises ExportError when its logits are not those of the live run.
    """
    model = load_exact(run)
    plans = plans_of(run, model, adapter, static)
    plan = _default(plans) if static and task is None else chosen(plans, task)
    tokens = probe(model)
    live = live_logits(model, adapter, plan, tokens)
    for layer, delta in plan.deltas(model, adapter):
        layer.set_base_weight(layer.get_base_weight() + delta)
    merged = cast(PreTrainedModel, cast(BaseTuner, model.base_model).unload())
    require_close("the merged model", far(live, logits_of(merged, tokens)))
    return Merged(merged, plan, tokens, live)


def about_base(recipe: Recipe) -> str:
    """What a user of a quantised run has to know of its merged model."""
    if recipe.quantize is None:
        return ""
    return f"; trained on the base in {recipe.quantize}, merged into it unquantised"


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


def _default(plans: Sequence[Plan]) -> Plan:
    return next(plan for plan in plans if plan.name == "all_tasks" or len(plans) == 1)


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def _card(recipe: Recipe, merged: Merged, note: str) -> str:
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
