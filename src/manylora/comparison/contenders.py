"""Methods at equal trained parameters: names and a budget become configurations.

Each method gets the largest size whose trained parameters do not exceed the budget (branches that
need not be equal differ by one in rank to come near it), everything counted: routers, scales,
DoRA's magnitudes, AdaLoRA's singular values and first ranks, P-Tuning's encoder. A method that
cannot meet the budget stays, and its note says by how much it misses.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

from peft import AdaLoraConfig, PeftConfig
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from manylora.adapter.config import ManyLoraConfig
from manylora.comparison.baselines import KINDS, SELECTION, Kind, Values
from manylora.comparison.site import Site

# What a recipe's adapter may say for all methods; method and r are the comparison's own.
FOR_ALL = (*SELECTION, "lora_alpha", "lora_dropout")
# Fields that a name cannot carry: the same for all methods, or no single value.
_NOT_GIVEN = {
    *SELECTION,
    "method",
    "rank_pattern",
    "alpha_pattern",
    "num_tasks",
    "init_weights",
    "selector",
    "format_version",
    "modules_to_save",
    "trainable_token_indices",
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method as it is trained.

    name: as it was asked for, fields included. label: with its size, as "HydraLoRA r=6, 3
    branches". config: None is full fine-tuning. note: how the budget is met, or why it is not.
    centre_lr: the rate around which its best is looked for.
    """

    name: str
    label: str
    config: PeftConfig | None
    params: int
    note: str
    centre_lr: float


def contenders(
    names: Sequence[str],
    budget: str,
    base: PreTrainedModel,
    tasks: int,
    adapter: dict[str, Any],
    selector: int = 0,
) -> tuple[int, list[Contender]]:
    """The budget in parameters, and the methods in the order of their names.

    Args:
        names: of `baselines.KINDS`, with fields as in "hydralora:num_branches=5:router_input=Ax"
            or "lora_moe:r=2:branch_ranks=3+1+2". A size that is given is kept whatever the budget.
        budget: parameters, as in "5000000", or a method at a size, as in "lora:r=16".
        base: only its class and configuration are read.
        tasks: branches of the methods that choose their branch by task.
        adapter: what the recipe's adapter says, its defaults left out; of it, `FOR_ALL` counts.
        selector: numbers that the selector stores which chooses the branch, if it is not told.

    Raises ValueError for a name, field or value that is not known or does not fit.
    """
    chosen = _for_all(adapter)
    selection = {"target_modules": "all-linear"}
    selection |= {key: value for key, value in chosen.items() if key in SELECTION}
    site = Site.of(base, tasks, selection, selector)
    chosen = {**chosen, **selection}
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice or not names:
        raise ValueError(f"methods={list(names)}: give each once" if twice else "no methods given")
    total = _budget(budget, site, chosen)
    return total, [_contender(name, total, site, chosen) for name in names]


def for_steps(config: PeftConfig, steps: int) -> PeftConfig:
    """A copy for one run of that many optimizer steps; PEFT writes into the one that it is given.

    AdaLoRA keeps all its ranks for a tenth of the steps, then prunes, and trains what is left for
    the last three tenths: its authors' proportions, roughly (2303.10512).
    """
    config = deepcopy(config)
    if isinstance(config, AdaLoraConfig):
        first, last = steps // 10, steps * 3 // 10
        return dataclasses.replace(config, total_step=steps, tinit=first, tfinal=last)
    return config


def largest(cost: Callable[[int], int], budget: int, most: int | None = None) -> int:
    """The largest size from 1 to most that costs at most the budget; 1 when even that costs more.

    cost: a straight line, or one that bends upwards.
    """
    first = cost(1)
    if first >= budget:
        return 1
    bound = 1 + (budget - first) // (cost(2) - first)
    if most is not None:
        bound = min(bound, most)
    if cost(bound) <= budget:
        return bound
    return bisect_right(range(1, bound), budget, key=cost)


def _for_all(adapter: dict[str, Any]) -> Values:
    said = {key: value for key, value in adapter.items() if value is not None}
    for key, value in said.items():
        if key not in (*FOR_ALL, "method", "r"):
            raise ValueError(
                f"adapter.{key}={value!r} belongs to one of the methods that are compared; leave "
                f"it out of the recipe, and give it with the name: hydralora:{key}={value}"
            )
    return {key: said[key] for key in FOR_ALL if key in said}


def _budget(text: str, site: Site, chosen: Values) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    where = f"budget={text!r}"
    if not text[:1].isalpha():
        raise ValueError(f"{where} is neither parameters, as in 5000000, nor as in lora:r=16")
    kind, given = _parse(text)
    if not set(kind.sizes) <= set(given):
        needs = ":".join(f"{size}=16" for size in kind.sizes)
        raise ValueError(f"{where} gives no size; {text.partition(':')[0]}:{needs} would")
    return _built(text, kind, site, chosen, given)[0]


def _contender(name: str, budget: int, site: Site, chosen: Values) -> Contender:
    kind, given = _parse(name)
    if "branch_ranks" in given and "r" not in given:
        raise ValueError(f"{name}: give r too, which the scaling alpha / r of all branches is of")
    values = dict(given)
    for size in kind.sizes:
        if size not in given:
            cost = partial(_cost, name, kind, site, chosen, dict(values), size)
            values[size] = largest(cache(cost), budget, kind.most)
    if kind.uneven and "r" not in given:
        values |= _larger_branches(name, budget, kind, site, chosen, values)
    params, config = _built(name, kind, site, chosen, values)
    sizes = {size: values[size] for size in kind.sizes if size not in given}
    note = _note(kind, sizes, params, budget)
    if config is not None and chosen.get("lora_dropout") and not _takes(kind, "lora_dropout"):
        note += f"; without the dropout of {chosen['lora_dropout']}, which it does not have"
    return Contender(name, _label(kind, config, given), config, params, note, kind.centre_lr)


def _larger_branches(
    name: str, budget: int, kind: Kind, site: Site, chosen: Values, values: Values
) -> Values:
    """One rank more for as many branches as the budget has room for; alpha / r stays."""
    _, config = _built(name, kind, site, chosen, values)
    assert isinstance(config, ManyLoraConfig)
    branches, r = config.branches_of(), config.r
    if branches.share_A or branches.share_B:
        return {}
    for more in range(branches.count - 1, 0, -1):
        larger = {"branch_ranks": [r + 1] * more + [r] * (branches.count - more)}
        if _built(name, kind, site, chosen, {**values, **larger})[0] <= budget:
            return larger
    return {}


def _cost(
    name: str, kind: Kind, site: Site, chosen: Values, values: Values, size: str, value: int
) -> int:
    return _built(name, kind, site, chosen, {**values, size: value})[0]


def _built(
    name: str, kind: Kind, site: Site, chosen: Values, values: Values
) -> tuple[int, PeftConfig | None]:
    """The trained parameters, and the configuration that has them."""
    if kind.config is None:
        return site.parameters, None
    try:
        config = kind.configuration(site, chosen, values)
        return site.trained(config), config
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{name} does not fit this base model or recipe: {error}") from error


def _note(kind: Kind, sizes: Values, params: int, budget: int) -> str:
    note = f"{params / budget:.2f} of the budget"
    last = kind.sizes[-1] if kind.sizes else None
    if last is None:
        note += f": {kind.label} has no size"
    elif not sizes:
        note += ", which is not applied: the size is given"
    elif params > budget:
        note += f": it has no smaller size than {last}=1"
    elif sizes.get(last) == kind.most:
        note += f": {kind.most} virtual tokens at most"
    return f"{note}; {kind.remark}" if kind.remark else note


def _label(kind: Kind, config: PeftConfig | None, given: Values) -> str:
    shape = kind.shape.format(config)
    said = {**given, "branch_ranks": "+".join(map(str, given.get("branch_ranks", [])))}
    shown = [f"{key}={said[key]}" for key in given if f"{{0.{key}}}" not in kind.shape]
    label = ", ".join([f"{kind.label} {shape}".strip(), *shown])
    if "branch_ranks" in given:
        return label
    if isinstance(config, ManyLoraConfig) and config.branch_ranks is not None:
        label += f", {config.branch_ranks.count(config.r + 1)} of them with r={config.r + 1}"
    return label


def _parse(text: str) -> tuple[Kind, Values]:
    """A name and its fields: "hydralora:num_branches=5:router_input=Ax"."""
    name, *parts = text.split(":")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known methods: {', '.join(KINDS)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    kind = KINDS[name]
    given: Values = {}
    for part in parts:
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{text!r}: {part!r} is not field=value, as in hydralora:r=4")
        given[key] = _value(name, kind, key, value)
    return kind, given


def _value(name: str, kind: Kind, key: str, text: str) -> Any:
    hints = typing.get_type_hints(kind.config) if kind.config is not None else {}
    known = set(hints) - set(typing.get_type_hints(PeftConfig))
    known -= _NOT_GIVEN | kind.not_set | set(kind.decided)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
        raise ValueError(f"{name} has no field {key!r} to set here; {hint}")
    try:
        value = TypeAdapter(hints[key]).validate_python(
            text.split("+") if key == "branch_ranks" else text
        )
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(f"{name}:{key}={text}: {problem[0].lower()}{problem[1:]}") from None
    if key in kind.sizes and value < 1:
        raise ValueError(f"{name}:{key}={text} must be at least 1")
    return value


def _takes(kind: Kind, key: str) -> bool:
    return kind.config is not None and key in kind.config.__dataclass_fields__
