"""Which branches each task uses, how sure of it the routing is, and how much it says of the task.

For layer l, task t and its tokens x, with mixing weights g(x) (N,) that sum to 1:

    weight[l, t, i]        = mean over x of g_i(x)                     the mean m_t (N,)
    of_mean[l, t]          = H(m_t)                                    H(p) = -sum_i p_i log p_i
    mean_of_tokens[l, t]   = mean over x of H(g(x))                    never above of_mean
    nats[l]                = H(mean over t of m_t) - mean over t of H(m_t)

All in nats; every task counts the same, however many tokens it has. of_mean is large where a task
uses all branches, mean_of_tokens is small where each of its tokens uses few: their difference is
what a branch, drawn with the weights of a token, says of the token. `nats` is the mutual
information of branch and task, log(number of tasks) where each task has a branch of its own.

A token router's numbers are those that scoring the run left in routing.json. A learned row per task
and a one-hot gate are known from the weights alone, and are the same for all tokens of a task.
Methods with constant weights choose nothing: their tables are empty. Weights of a task are in the
order of its id; tasks are clusters in a run that was trained on clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import entr

from manylora.adapter.config import ManyLoraConfig
from manylora.inspect.adapters import Adapter, Branched, read
from manylora.inspect.places import place_of
from manylora.inspect.routing import ROUTING_FILE, read_routing
from manylora.methods import Gate

Floats = npt.NDArray[np.float64]
_WHERE = ("run", "layer", "module", "depth")


@dataclass(frozen=True)
class Mixing:
    """Mean mixing weights of a run: means (tasks, layers, N); entropies (tasks, layers) of a token.

    entropies is None where they were not measured.
    """

    run: str
    gate: Gate
    layers: list[str]
    tasks: list[str]
    means: Floats
    entropies: Floats | None

    @property
    def branches(self) -> int:
        return int(self.means.shape[2])

    @property
    def of_means(self) -> Floats:
        """H(m_t), (tasks, layers)."""
        found: Floats = entr(self.means).sum(-1)
        return found

    @property
    def nats(self) -> Floats:
        """Mutual information of branch and task, (layers,); rounding never makes it negative."""
        found: Floats = entr(self.means.mean(0)).sum(-1) - self.of_means.mean(0)
        return np.maximum(found, 0)

    @property
    def most_nats(self) -> float:
        """What a branch can say of the task at most: log(min(tasks, N))."""
        return float(np.log(min(len(self.tasks), self.branches)))


def mixing(run: str | Path) -> Mixing | None:
    """What is known of a run's mixing weights; None where its method has constant ones.

    Raises FileNotFoundError for a token router that was not measured, and what
    `manylora.inspect.adapters.read` raises.
    """
    return mixing_of(read(run))


def mixing_of(adapter: Adapter) -> Mixing | None:
    """`mixing` of an adapter that was read."""
    gate = gate_of(adapter)
    if gate == "router":
        return _measured(adapter)
    return _of_gates(adapter, gate) if gate in ("task", "one_hot") else None


def gate_of(adapter: Adapter) -> Gate | None:
    """Where its mixing weights come from; None for one without branches of manylora's."""
    config = adapter.config
    return config.branches_of().gate if isinstance(config, ManyLoraConfig) else None


def _measured(adapter: Adapter) -> Mixing:
    if not (adapter.folder / ROUTING_FILE).is_file():
        raise FileNotFoundError(
            f"{adapter.folder} has no {ROUTING_FILE}: where its router sends tokens was not "
            f"measured; measure it with `manylora eval {adapter.folder}`"
        )
    routing = read_routing(adapter.folder)
    entropies = routing.get("entropies")
    return Mixing(
        adapter.name,
        "router",
        routing["layers"],
        list(routing["tasks"]),
        np.array(list(routing["tasks"].values()), dtype=np.float64),
        None if entropies is None else np.array([entropies[task] for task in routing["tasks"]]),
    )


def _of_gates(adapter: Adapter, gate: Gate) -> Mixing:
    """The rows of a learned or one-hot gate, under the names that the adapter's parts have."""
    layers = {name: layer for name, layer in adapter.layers.items() if isinstance(layer, Branched)}
    parts = list(next(iter(layers.values())).weights)
    means = np.array([[_row(layer, part) for layer in layers.values()] for part in parts])
    tasks = [part.partition(" ")[2] for part in parts]
    return Mixing(adapter.name, gate, list(layers), tasks, means, entr(means).sum(-1))


def _row(layer: Branched, part: str) -> list[float]:
    weights = layer.weights[part]
    assert weights is not None  # a gate that needs ids has weights for each
    found: list[float] = weights.detach().double().tolist()
    return found


def usage(run: str | Path) -> pd.DataFrame:
    """The mean weight of each branch: run, layer, module, depth, task, branch (int), weight.

    Empty for constant weights. Raises as `mixing`.
    """
    found = mixing(run)
    rows = [
        (*where, task, branch, weight)
        for place, where in _places(found)
        for task, means in _tasks(found)
        for branch, weight in enumerate(means[place].tolist())
    ]
    return pd.DataFrame(rows, columns=[*_WHERE, "task", "branch", "weight"])


def entropy(run: str | Path) -> pd.DataFrame:
    """Entropies in nats: run, layer, module, depth, task, of_mean, mean_of_tokens.

    Empty for constant weights. Raises as `mixing`, and FileNotFoundError for a run whose
    routing.json is of a version that did not measure tokens.
    """
    found = mixing(run)
    columns = [*_WHERE, "task", "of_mean", "mean_of_tokens"]
    if found is None:
        return pd.DataFrame(columns=columns)
    if found.entropies is None:
        raise FileNotFoundError(
            f"{Path(run) / ROUTING_FILE} has no entropies, for an older version of manylora wrote "
            f"it; measure them with `manylora eval {run}`"
        )
    of_means, entropies = found.of_means.tolist(), found.entropies.tolist()
    rows = [
        (*where, task, of_means[i][place], entropies[i][place])
        for place, where in _places(found)
        for i, task in enumerate(found.tasks)
    ]
    return pd.DataFrame(rows, columns=columns)


def information(run: str | Path) -> pd.DataFrame:
    """Mutual information of branch and task: run, layer, module, depth, nats, share.

    share: of log(min(tasks, N)), the most there can be. Empty for constant weights, one branch or
    one task, which leave nothing to tell. Raises as `mixing`.
    """
    found = mixing(run)
    columns = [*_WHERE, "nats", "share"]
    if found is None or found.most_nats == 0:
        return pd.DataFrame(columns=columns)
    nats, most = found.nats.tolist(), found.most_nats
    rows = [(*where, nats[place], nats[place] / most) for place, where in _places(found)]
    return pd.DataFrame(rows, columns=columns)


def _places(found: Mixing | None) -> Iterator[tuple[int, tuple[str, str, str, int]]]:
    """Each layer's place, and what the first columns of its rows are."""
    if found is not None:
        for place, layer in enumerate(found.layers):
            yield place, (found.run, layer, *place_of(layer))


def _tasks(found: Mixing | None) -> Iterator[tuple[str, Floats]]:
    """Each task and its means (layers, N)."""
    if found is not None:
        yield from zip(found.tasks, found.means, strict=True)
