"""What is wrong with a run's routing, its branches or its selector, and what to change.

With N branches, T tasks, and for layer l the entropies and the information of `usage.py`, all in
nats, `said[l]` is what a branch, drawn with the weights of a token, says of the token:

    said[l] = nats[l] + mean over t of (of_mean[l, t] - mean_of_tokens[l, t])

    collapse        max_i mean over t of weight[l, t, i] >= COLLAPSED    in most layers
    dead branch     weight[l, t, i] < DEAD / N                           in all layers and tasks
    averaged        said[l] <= SILENT log N, entropy >= EVEN log N       in most layers
    constant mix    said[l] <= SILENT log N                              in most layers
    blind to task   nats[l] <= SILENT log min(T, N), said[l] above       in most layers
    copies          cosine of the updates B_i A_i and B_j A_j over all layers >= COPIES
    no update       B_i A_i = 0
    refused         of all held-out prompts, share that the selector gives no branch >= REFUSES
    mistaken        of those that get one, share that get another task's         >= MISTAKES

None of these stops a run: each is a `note`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from manylora.findings import Finding
from manylora.inspect.adapters import Adapter, read
from manylora.inspect.copies import shares_A, similarity
from manylora.inspect.selector import REFUSED, confusion
from manylora.inspect.usage import Floats, Mixing, gate_of, mixing_of

Flags = npt.NDArray[np.bool_]  # one a layer

MOST = 0.5
"""Share of the layers: a few odd ones are normal, and the adapter works by the others."""
COLLAPSED = 0.95
"""Mean weight: all the others together add a twentieth."""
DEAD = 0.1
"""Of the even share 1 / N: its update and its gradient count a tenth of what they could."""
EVEN = 0.99
"""Of log N: three branches at 0.39, 0.33 and 0.28 still reach it."""
SILENT = 0.01
"""Of what could be said: three weights of 1/3 that move by 0.05 from token to token reach it."""
COPIES = 0.9
"""Cosine: the difference of two such updates has a tenth of the squared norms of both together."""
REFUSES = 0.1
"""Ten times the share of own prompts that training lets a selector refuse."""
MISTAKES = 0.1
"""A prompt in ten: what makes the branches of the tasks no longer theirs in use."""

_PLAIN = (
    "a plain LoRA at equal parameters (adapter.method=lora with a larger adapter.r), which merges "
    "exactly"
)
_OWN = (
    "if tasks disagree, give each a branch of its own: adapter.method=branch_per_cluster with "
    "adapter.shared_rank"
)
_APART = (
    "branches of a shared A that begin at B = 0 get the same gradient while they are mixed evenly: "
    "give them an A of their own (adapter.method=lora_moe), dropout of their own (adapter."
    "dropout_per_branch=true with adapter.lora_dropout), a router that learns faster "
    "(train.rates.router=10), or use "
)


def findings(run: str | Path) -> list[Finding]:
    """What to look into, most telling first; none where nothing is found.

    What was not measured is said too. Raises what `manylora.inspect.adapters.read` raises.
    """
    adapter = read(run)
    return [*_routing(adapter), *_branches(adapter), *_selector(adapter)]


def _routing(adapter: Adapter) -> list[Finding]:
    """Of a token router or a learned row per task; a one-hot gate is as it was told to be."""
    if gate_of(adapter) not in ("router", "task"):
        return []
    try:
        mixing = mixing_of(adapter)
    except FileNotFoundError as error:
        return [Finding("routing", "note", str(error))]
    if mixing is None or mixing.branches < 2:
        return []
    found = _collapse(mixing)
    found = found or [*_dead(mixing), *_silent(mixing)]
    if mixing.entropies is None:
        text = "how sure the router is of its tokens was not measured when this run was scored"
        found.append(Finding("routing", "note", text, f"manylora eval {adapter.folder}"))
    return found


def _collapse(mixing: Mixing) -> list[Finding]:
    means = mixing.means.mean(0)
    layers = means.max(-1) >= COLLAPSED
    if layers.mean() <= MOST:
        return []
    used = np.unique(means[layers].argmax(-1)).tolist()
    which = f"branch {used[0]}" if len(used) == 1 else "one branch"
    return [
        Finding(
            "routing",
            "note",
            f"collapse: {which} takes {COLLAPSED:.0%} or more of the weight in "
            f"{_of_layers(layers)}; the others cost parameters and do nothing there",
            f"{_slower(mixing)}; else {_PLAIN}",
        )
    ]


def _dead(mixing: Mixing) -> list[Finding]:
    least = DEAD / mixing.branches
    dead = np.flatnonzero(mixing.means.max((0, 1)) < least).tolist()
    return [
        Finding(
            "routing",
            "note",
            f"branch {branch} is dead: no task gives it {least:.1%} of the weight in any layer, "
            f"a tenth of an even share",
            f"adapter.num_branches={mixing.branches - len(dead)}, or {_slower(mixing)}",
        )
        for branch in dead
    ]


def _slower(mixing: Mixing) -> str:
    """How branches are kept in use; a balance loss is for routers alone."""
    if mixing.gate == "task":
        return "let the gate learn more slowly (train.rates.gate=0.1)"
    return (
        "keep all branches in use with adapter.balance_loss=cv_squared (or switch), or let the "
        "router learn more slowly (train.rates.router=0.1)"
    )


def _faster(mixing: Mixing) -> str:
    part = "gate" if mixing.gate == "task" else "router"
    return f"let the {part} learn faster (train.rates.{part}=10)"


def _silent(mixing: Mixing) -> list[Finding]:
    if mixing.entropies is None:
        return []
    most = float(np.log(mixing.branches))
    said = mixing.nats + (mixing.of_means - mixing.entropies).mean(0)
    even = mixing.entropies.mean(0) >= EVEN * most
    silent = said <= SILENT * most
    if even.mean() > MOST:
        return [Finding("routing", "note", *_averaged(mixing, even))]
    if silent.mean() > MOST:
        return [Finding("routing", "note", *_constant(mixing, silent))]
    blind = mixing.nats <= SILENT * mixing.most_nats
    if mixing.most_nats > 0 and blind.mean() > MOST:
        return [Finding("routing", "note", *_blind(mixing, blind))]
    return []


def _averaged(mixing: Mixing, layers: Flags) -> tuple[str, str]:
    return (
        f"the branches are averaged: in {_of_layers(layers)} every token mixes them almost evenly "
        f"(entropy {EVEN:.0%} of the most or more), so together they are one LoRA",
        f"{_faster(mixing)}, use fewer branches, or {_PLAIN}; {_OWN}",
    )


def _constant(mixing: Mixing, layers: Flags) -> tuple[str, str]:
    return (
        f"the routing ignores the input: in {_of_layers(layers)} all tokens mix the branches "
        f"alike (less than {SILENT:.0%} of what a branch could say of its token)",
        f"{_faster(mixing)}, or use {_PLAIN}; `manylora export RUN --static` fixes a router's mix "
        "and tells what that loses",
    )


def _blind(mixing: Mixing, layers: Flags) -> tuple[str, str]:
    share = float(np.median(mixing.nats) / mixing.most_nats)
    return (
        f"the router tells tokens apart, and not tasks: in {_of_layers(layers)} a branch says less "
        f"than {SILENT:.0%} of what it could of the task (median {share:.2%})",
        f"nothing, if the tasks do not get in each other's way; {_OWN}",
    )


def _of_layers(layers: Flags) -> str:
    return f"{int(layers.sum())} of {len(layers)} layers"


def _branches(adapter: Adapter) -> list[Finding]:
    alike = similarity(adapter)
    if alike is None:
        return []
    empty = np.flatnonzero(np.isnan(np.diag(alike))).tolist()
    found = [
        Finding(
            "branches",
            "note",
            f"branch {branch} has no update in any layer: nothing was learned in it",
            "train longer, or see that its task or cluster has rows: `manylora data`",
        )
        for branch in empty
    ]
    return found + _copies(adapter, alike)


def _copies(adapter: Adapter, alike: Floats) -> list[Finding]:
    first, second = np.triu_indices(len(alike), 1)
    cosines = np.nan_to_num(alike[first, second])
    copies = int((cosines >= COPIES).sum())
    if not copies:
        return []
    most = int(cosines.argmax())
    return [
        Finding(
            "branches",
            "note",
            f"{copies} of {len(cosines)} pairs of branches are nearly copies: the cosine of their "
            f"updates is {COPIES} or more, of branches {first[most]} and {second[most]} "
            f"{cosines[most]:.3f}",
            (_APART if shares_A(adapter) else "use fewer branches, or ") + _PLAIN,
        )
    ]


def _selector(adapter: Adapter) -> list[Finding]:
    try:
        rows = confusion(adapter.folder)
    except FileNotFoundError as error:
        return [Finding("selector", "note", str(error))]
    total = int(rows["rows"].sum())
    if not total:
        return []
    refused = rows[rows["branch"] == REFUSED]
    mistaken = rows[(rows["branch"] != REFUSED) & (rows["branch"] != rows["task"])]
    none, wrong = int(refused["rows"].sum()), int(mistaken["rows"].sum())
    found = []
    if none >= REFUSES * total:
        worst = refused.loc[refused["rows"].idxmax()]
        found.append(
            Finding(
                "selector",
                "note",
                f"the selector finds no branch for {none} of {total} held-out prompts of its own "
                f"tasks, most of all of {worst['task']} ({worst['rows']}); they get the shared "
                "branch alone, or none",
                "say the task where it is known (manylora.branch_ids), word prompts as in "
                "training, or train on more rows of such tasks",
            )
        )
    if wrong and wrong >= MISTAKES * (total - none):
        worst = mistaken.loc[mistaken["rows"].idxmax()]
        found.append(
            Finding(
                "selector",
                "note",
                f"the selector gives {wrong} of {total - none} held-out prompts another task's "
                f"branch, most of all {worst['task']} that of {worst['branch']} ({worst['rows']})",
                "say the task where it is known (manylora.branch_ids), or make one task of those "
                "that are worded alike (tasks=discovered finds such)",
            )
        )
    return found
