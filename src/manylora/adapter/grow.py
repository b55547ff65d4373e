"""A trained adapter put into a fresh one that may have more branches or tasks.

What the old adapter had keeps its values; a new branch n starts so that outputs stay:

    gate      new branch                                         outputs at the start
    ones      as the method starts: B_n (or c_n) zero            the same
    uniform   the same, and B times N_new / N_old, because       the same
              the weights become 1 / N_new
    one_hot   as the method starts                               the same for old branches
    task      a copy of the most used branch i, and the weight   the same for old tasks
              of i split between them, a share of its own for
              each task: l_i + log f_t, l_n + log (1 - f_t)
    router    the mean branch, sum_i w_i B_i A_i, w the mean     move by g_n(x) (mean - usual)
              routing weights; R_n as the method starts

With B shared, A_n is zero instead. Splitting is exact because the softmax of two equal branches
adds up; a router has no constant term to split with. Its new row takes g_n(x) from the others, and
with a zero branch all of the update would shrink by that; with the mean branch only what x gets
more or less of than the mean does, which is nothing on average. The mean branch is exact where A or
B is shared, else its best approximation of the rank at hand (SVD). A router that reads A x gives
the new rows of A no weight at first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import ManyLoraLayer
from manylora.adapter.router import softmax
from manylora.methods import Branches

_SAME = (
    "method",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
)
_SAME_BRANCHES = ("gate", "share_A", "share_B", "router_input", "shared_rank")

Parts = dict[str, Tensor]


def check_fits(old: ManyLoraConfig, new: ManyLoraConfig) -> None:
    """Raise ValueError, naming each field and both values, where `new` is not a grown `old`."""
    was, now = old.branches_of(), new.branches_of()
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in _SAME]
    pairs += [(name, getattr(was, name), getattr(now, name)) for name in _SAME_BRANCHES]
    wrong = [f"{name}: {_shown(a)} there, {_shown(b)} here" for name, a, b in pairs if a != b]
    if now.count < was.count:
        wrong.append(f"num_branches: {was.count} there, {now.count} here, and none can be dropped")
    elif now.ranks[: was.count] != was.ranks and old.r == new.r:
        wrong.append(f"branch_ranks: {list(was.ranks)} there, {list(now.ranks)} here")
    if now.num_tasks < was.num_tasks:
        wrong.append(f"tasks: {was.num_tasks} there, {now.num_tasks} here, and none can be dropped")
    if wrong:
        raise ValueError(
            "the adapter to start from does not fit the one to train:\n  " + "\n  ".join(wrong)
        )


def grow(
    model: PeftModel,
    old: ManyLoraConfig,
    tensors: Mapping[str, Tensor],
    routing: Mapping[str, Sequence[float]] | None = None,
    adapter: str = "default",
) -> None:
    """Put a trained adapter into the fresh adapter of `model`, which may have more branches.

    Args:
        old, tensors: configuration and state dict of the trained adapter, as PEFT saves them.
        routing: mean routing weights of its branches for each layer name, for a router that gets
            new branches; without them every branch counts the same.

    Raises ValueError as `check_fits`, or when the adapters are not on the same layers.
    """
    config = cast(ManyLoraConfig, model.peft_config[adapter])
    check_fits(old, config)
    fresh: Parts = get_peft_model_state_dict(model, adapter_name=adapter)
    there, here = set(tensors) - set(fresh), set(fresh) - set(tensors)
    if there or here:
        raise _other_layers(
            f"{_some(there)} there alone, {_some(here)} here alone; "
            f"target_modules: {_modules(old)} there, {_modules(config)} here"
        )
    state = {name: tensor.to(fresh[name].device) for name, tensor in tensors.items()}
    for prefix, layer in model.named_modules():
        if isinstance(layer, ManyLoraLayer) and adapter in layer.branches:
            names = {
                part: f"{prefix}.manylora_{part}.weight"
                for part in layer.branches[adapter].shapes(layer.in_features, layer.out_features)
            }
            was = old.branches_of(layer.name)
            for part, shape in was.shapes(layer.in_features, layer.out_features).items():
                if tuple(state[names[part]].shape) != shape:
                    raise _other_layers(f"{names[part]} is {tuple(state[names[part]].shape)} there")
            grown = grow_layer(
                was,
                layer.branches[adapter],
                {part: state[name] for part, name in names.items()},
                {part: fresh[name] for part, name in names.items()},
                None if routing is None else torch.tensor(routing[layer.name]),
            )
            state.update({names[part]: tensor for part, tensor in grown.items()})
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def grow_layer(
    old: Branches, new: Branches, was: Parts, fresh: Parts, routing: Tensor | None = None
) -> Parts:
    """The tensors of one layer: those it had, in the places of `fresh`, and the new branches'."""
    grown = {part: tensor.detach().clone() for part, tensor in fresh.items()}
    if "router" in grown:  # its columns for rows of A that are new
        grown["router"][: old.count, was["router"].shape[1] :] = 0
    for part, tensor in was.items():
        rows, columns = tensor.shape
        grown[part][:rows, :columns] = tensor.to(grown[part])
    if old.gate == "uniform":
        grown["B"] *= new.count / old.count
    for branch in range(old.count, new.count):
        if new.gate == "router":
            _add_mean(old, new, grown, branch, routing)
        elif new.gate == "task":
            _split_most_used(old, new, grown, branch)
        elif new.share_B:
            _rows(new, grown, branch).zero_()
        elif not new.scaled:
            _columns(new, grown, branch).zero_()
        else:
            grown["scale"][branch] = 0
    return grown


def _rows(branches: Branches, t: Parts, branch: int) -> Tensor:
    """A of one branch."""
    return t["A"] if branches.share_A else torch.split(t["A"], list(branches.ranks))[branch]


def _columns(branches: Branches, t: Parts, branch: int) -> Tensor:
    """B of one branch."""
    return t["B"] if branches.share_B else torch.split(t["B"], list(branches.ranks), 1)[branch]


def _add_mean(old: Branches, new: Branches, t: Parts, branch: int, routing: Tensor | None) -> None:
    weights = torch.full((old.count,), 1 / old.count) if routing is None else routing
    exact = {part: tensor.double() for part, tensor in t.items()}
    w = weights.to(exact["A"]) / weights.sum()
    scaled = [
        w[i] * _columns(new, exact, i) * (exact["scale"][i].unsqueeze(1) if new.scaled else 1)
        for i in range(old.count)
    ]
    if new.share_B:
        rows = sum(w[i] * _rows(new, exact, i) for i in range(old.count))
        _rows(new, t, branch).copy_(cast(Tensor, rows))
    elif new.share_A:
        _columns(new, t, branch).copy_(cast(Tensor, sum(scaled)))
    else:
        left = torch.cat(scaled, 1)
        right = torch.cat([_rows(new, exact, i) for i in range(old.count)])
        B, A = _low_rank(left, right, new.ranks[branch])
        columns = _columns(new, t, branch).zero_()
        columns[:, : B.shape[1]] = B.to(columns)
        _rows(new, t, branch)[: len(A)] = A.to(columns)
    if new.scaled:
        t["scale"][branch] = 1


def _low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of left @ right of at most that rank, as two factors alike in size."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), (root.unsqueeze(1) * v[:rank]) @ q_right.T


def _split_most_used(old: Branches, new: Branches, t: Parts, branch: int) -> None:
    """Copy the branch with the largest weight over the old tasks, and share that weight with it."""
    gate = t["gate"][: old.num_tasks]
    use = softmax(gate[:, :branch].double()).sum(0)
    alike = [i for i in range(branch) if new.ranks[i] == new.ranks[branch]]
    if not alike:
        raise ValueError(
            f"branch_ranks={list(new.ranks)}: a new branch of a task gate starts as a copy of one "
            f"that is there, so its rank must be one of {sorted(set(old.ranks))}"
        )
    twin = max(alike, key=lambda i: float(use[i]))
    if not new.share_A:
        _rows(new, t, branch).copy_(_rows(new, t, twin))
    if not new.share_B:
        _columns(new, t, branch).copy_(_columns(new, t, twin))
    if new.scaled:
        t["scale"][branch] = t["scale"][twin]
    share = 0.25 + 0.5 * torch.rand(old.num_tasks, dtype=torch.float64)
    logits = gate[:, twin].double()
    gate[:, branch] = (logits + torch.log1p(-share).to(logits)).to(gate)
    gate[:, twin] = (logits + torch.log(share).to(logits)).to(gate)


def _other_layers(difference: str) -> ValueError:
    return ValueError(
        f"the adapter to start from has other layers than the one to train: {difference}"
    )


def _some(names: set[str]) -> str:
    return f"{len(names)} tensors" + (f", such as {min(names)}," if names else "")


def _modules(config: ManyLoraConfig) -> str:
    """target_modules in short: PEFT writes "all-linear" out as the name of each layer."""
    modules = config.target_modules
    if isinstance(modules, str) or modules is None:
        return repr(modules)
    return repr(sorted({name.rpartition(".")[2] for name in modules}))


def _shown(value: object) -> str:
    return repr(sorted(value)) if isinstance(value, set) else repr(value)
