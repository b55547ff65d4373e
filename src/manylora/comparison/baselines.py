"""The methods that a comparison knows by name: what each is at a size, and its centre of the rates.

LoRA, DoRA, rsLoRA, AdaLoRA, IA3, Lily and the prompt methods are PEFT's; the others are manylora's.
Every method adapts the same layers of the base model, and the scaling alpha / r is 2 wherever there
is one, unless the recipe's adapter or the name's own fields say lora_alpha. (A scaling and a rate
do much the same to Adam, and the rate is tuned. HydraLoRA's script has 8, its Table 2 none.)
Departures:

    rslora                       alpha / sqrt(r) with alpha 16, as its paper (2312.03732)
    branch_per_cluster_shared    one alpha serves both ranks: alpha = 2 sqrt(r shared_rank), so that
                                 the private scaling is as far above 2 as the shared one below it
    lily                         PEFT's own comparison on MetaMathQA: scaling 4, half of the blocks
                                 share an A, 2 of B
    adalora                      begins with 1.5 times the rank it ends with (2303.10512)
    ia3                          all layers, not keys, values and the second feed-forward layer
                                 alone; that last one's vector scales its input (2205.05638),
                                 where PEFT knows the layer

Centres of the rates, around which each method's own is looked for:

    1e-3     LoRA and its relatives, on 135 M parameters (a first comparison of ours, one GPU)
    2e-3     MultiLoRA: about twice LoRA's there. AdaLoRA: its authors' 5e-4 to 2.2e-3, upper end,
             because A and B begin small and the singular values at zero
    8e-3     IA3: the 3e-3 of 2205.05638 is Adafactor's; PEFT's examples have 5e-3 and 8e-3
    1e-4     everything: a tenth of LoRA's (Schulman et al., LoRA Without Regret, 2025)
    1e-2     prompt tuning, prefix tuning (P-Tuning v2, 2110.07602: 5e-3 to 2e-2)
    1e-3     P-Tuning: its encoder is a network, not a prompt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LilyConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD

from manylora.adapter.config import ManyLoraConfig
from manylora.comparison.site import Site
from manylora.methods import METHODS

Values = dict[str, Any]
MOST_TOKENS = 100
SHARED_TO_PRIVATE = 8


@dataclass(frozen=True)
class Kind:
    """A method by name.

    config: None is full fine-tuning. label: how tables name it; shape: its size, a format of the
    configuration. sizes: the fields that meet the budget, one after the other. most: of a size.
    decided: fields that make the method what it is. defaults: the other fields, given what is known
    of them. where: its layers, for a configuration that does not choose them as LoRA's does.
    uneven: whether its branches may differ by one in rank, to come nearer to the budget. not_set:
    fields that nobody gives. remark: what a reader of the scores should know.
    """

    config: type[PeftConfig] | None
    label: str
    centre_lr: float
    shape: str = ""
    sizes: tuple[str, ...] = ()
    most: int | None = None
    decided: Mapping[str, Any] = field(default_factory=dict)
    defaults: Callable[[Site, Values], Values] = lambda site, values: {}
    where: Callable[[Site], Values] | None = None
    uneven: bool = False
    not_set: frozenset[str] = frozenset()
    remark: str = ""

    def configuration(self, site: Site, chosen: Values, given: Values) -> PeftConfig:
        """Of a method with a configuration. chosen: what the recipe's adapter says for all methods;
        given: the sizes and the name's own fields, which go before it.
        """
        assert self.config is not None
        takes = self.config.__dataclass_fields__
        where = {} if self.where is None else self.where(site)
        left_out = SELECTION if self.where else ()
        chosen = {k: v for k, v in chosen.items() if k in takes and k not in left_out}
        defaults = self.defaults(site, {**self.decided, **given})
        values = {**defaults, **chosen, **given, **self.decided, **where}
        return self.config(task_type="CAUSAL_LM", **values)


SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _alpha(site: Site, values: Values) -> Values:
    return {"lora_alpha": 2 * values["r"]}


def _ours(site: Site, values: Values) -> Values:
    gate = values.get("gate") or METHODS[values["method"]].gate
    found = {"num_branches": METHODS[values["method"]].branches, "lora_alpha": 2 * values["r"]}
    if gate == "one_hot":
        found["num_branches"] = site.tasks
    if gate == "task":
        found["num_tasks"] = site.tasks
    return found


def _shared(site: Site, values: Values) -> Values:
    shared = values.get("shared_rank", SHARED_TO_PRIVATE * values["r"])
    alpha = 2 * math.sqrt(values["r"] * shared)
    return {"num_branches": site.tasks, "shared_rank": shared, "lora_alpha": alpha}


def _adalora(site: Site, values: Values) -> Values:
    start = values["init_r"]
    # total_step has to be above zero; a run sets the schedule (contenders.for_steps).
    return {"target_r": max(round(start / 1.5), 1), "lora_alpha": 2 * start, "total_step": 1}


def _ia3_layers(site: Site) -> Values:
    second = tuple(FEED_FORWARD.get(site.model.config.model_type, ()))
    inputs = [name for name in site.targets if name.endswith(second)]
    return {"target_modules": list(site.targets), "feedforward_modules": inputs}


def _lily_layers(site: Site) -> Values:
    # PEFT shares A and B among the layers that one entry of target_modules matches, so that
    # "all-linear", a full name a layer, would share nothing.
    names = {target.rpartition(".")[2] for target in site.targets}
    others = [
        name
        for name, _ in site.model.named_modules()
        if name.rpartition(".")[2] in names and name not in site.targets
    ]
    if others:
        raise ValueError(
            "Lily shares A and B among all layers of a name, but the adapter's target modules "
            f"leave out {others[0]!r}, which has the name of one of them; leave lily out, or "
            "give target_modules as names, as in ['q_proj', 'v_proj']"
        )
    return {"target_modules": sorted(names)}


def _lily(site: Site, values: Values) -> Values:
    return {"num_B": 2, "stride_A": math.ceil(site.blocks / 2), "scaling": 4.0}


def _plain(label: str, **options: Any) -> Kind:
    values: Values = {"defaults": _alpha, "shape": "r={0.r}", "sizes": ("r",), "centre_lr": 1e-3}
    return Kind(LoraConfig, label, **values | options)


def _manylora(label: str, method: str, **options: Any) -> Kind:
    decided = {"method": method, **options.pop("decided", {})}
    shape = "r={0.r}, {0.num_branches} branches"
    values: Values = {"defaults": _ours, "shape": shape, "sizes": ("r",), "centre_lr": 1e-3}
    return Kind(ManyLoraConfig, label, decided=decided, **values | options)


KINDS: dict[str, Kind] = {
    "lora": _plain("LoRA"),
    "lora_split": _manylora("LoRA-Split", "lora_split", decided={"gate": "ones"}, uneven=True),
    "lora_split_one_hot": _manylora(
        "LoRA-Split by task",
        "lora_split",
        decided={"gate": "one_hot"},
        not_set=frozenset({"num_branches"}),
        remark="the same structure as branch_per_cluster",
    ),
    "multilora": _manylora("MultiLoRA", "multilora", centre_lr=2e-3, uneven=True),
    "hydralora": _manylora("HydraLoRA", "hydralora"),
    "lora_moe": _manylora("LoRA-MoE", "lora_moe", uneven=True),
    "branch_per_cluster": _manylora(
        "Branch per cluster", "branch_per_cluster", not_set=frozenset({"num_branches"})
    ),
    "branch_per_cluster_shared": _manylora(
        "Branch per cluster",
        "branch_per_cluster",
        shape="r={0.r} and r={0.shared_rank} shared, {0.num_branches} branches",
        sizes=("r", "shared_rank"),
        defaults=_shared,
        not_set=frozenset({"num_branches"}),
    ),
    "rslora": _plain(
        "rsLoRA", decided={"use_rslora": True}, defaults=lambda site, values: {"lora_alpha": 16}
    ),
    "dora": _plain("DoRA", decided={"use_dora": True}),
    "adalora": Kind(
        AdaLoraConfig,
        "AdaLoRA",
        centre_lr=2e-3,
        shape="r={0.init_r} to {0.target_r}",
        sizes=("init_r",),
        defaults=_adalora,
        not_set=frozenset({"r", "total_step", "tinit", "tfinal", "deltaT", "use_dora"}),
        remark="the budget is for the ranks it begins with",
    ),
    "ia3": Kind(IA3Config, "IA3", centre_lr=8e-3, where=_ia3_layers),
    "lily": Kind(
        LilyConfig,
        "Lily",
        centre_lr=1e-3,
        shape="r={0.r}, {0.num_B} B, an A for {0.stride_A} blocks",
        sizes=("r",),
        defaults=_lily,
        where=_lily_layers,
        remark="PEFT's Lily mixes by the mean over a batch, so a row's score depends on its batch",
    ),
    "prompt_tuning": Kind(
        PromptTuningConfig,
        "Prompt tuning",
        centre_lr=1e-2,
        shape="{0.num_virtual_tokens} tokens",
        sizes=("num_virtual_tokens",),
        most=MOST_TOKENS,
        # Better than random vectors at this size (2104.08691, figure 3).
        defaults=lambda site, values: {"prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "p_tuning": Kind(
        PromptEncoderConfig,
        "P-Tuning",
        centre_lr=1e-3,
        shape="{0.num_virtual_tokens} tokens, encoder {0.encoder_hidden_size} wide",
        sizes=("encoder_hidden_size",),
        defaults=lambda site, values: {"num_virtual_tokens": 20},
        remark="most of it is the encoder, which is not needed after training",
    ),
    # With init_weights="zero" all its tokens would have the same gradient for ever.
    "prefix_tuning": Kind(
        PrefixTuningConfig,
        "Prefix tuning",
        centre_lr=1e-2,
        shape="{0.num_virtual_tokens} tokens",
        sizes=("num_virtual_tokens",),
        most=MOST_TOKENS,
    ),
    "full": Kind(None, "Full fine-tuning", centre_lr=1e-4),
}
