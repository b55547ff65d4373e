"""A few held-out examples token by token, coloured by where a router sends them (`recorder.py`).

    weight[task, example, t, i] = mean over layers of g_i(x_t), or g_i(x_t) of one layer

A mean over layers hides layers that disagree: a few layers, spread over the depth, are kept by
themselves.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from manylora.inspect.adapters import read
from manylora.inspect.recorder import Examples, Shown
from manylora.inspect.routing import ROUTING_FILE, read_routing
from manylora.inspect.usage import gate_of

_COLUMNS = ["run", "task", "example", "position", "text", "branch", "weight"]


def tokens(run: str | Path, layer: str | None = None) -> pd.DataFrame:
    """One row for each token and branch: run, task, example, position, text, branch, weight.

    layer: one of `kept_layers(run)`; None for the mean over all layers. position: the token's place
    in its example, which may begin before what is kept. A token that is part of a character has an
    empty text, and the character stands at its last one. Empty for a method without a token router.

    Raises FileNotFoundError where no examples were kept, ValueError for a layer that was not, and
    what `manylora.inspect.adapters.read` raises.
    """
    found = _examples(run)
    if found is None:
        return pd.DataFrame(columns=_COLUMNS)
    if layer is not None and layer not in found["layers"]:
        raise ValueError(
            f"{Path(run) / ROUTING_FILE} keeps no tokens of layer {layer!r} by itself; it does of "
            f"{', '.join(found['layers']) or 'none'}"
        )
    name = Path(run).resolve().name
    rows = [
        (name, task, example, shown["start"] + place, text, branch, weight)
        for task, examples in found["tasks"].items()
        for example, shown in enumerate(examples)
        for place, text in enumerate(shown["text"])
        for branch, weight in enumerate(_weights(shown, found["layers"], layer)[place])
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _weights(shown: Shown, layers: list[str], layer: str | None) -> list[list[float]]:
    return shown["weights"] if layer is None else shown["by_layer"][layers.index(layer)]


def kept_layers(run: str | Path) -> list[str]:
    """The layers whose tokens `tokens` shows by themselves. Raises as it does."""
    found = _examples(run)
    return [] if found is None else found["layers"]


def _examples(run: str | Path) -> Examples | None:
    """None for a method without a token router."""
    path = Path(run) / ROUTING_FILE
    found = read_routing(path.parent).get("examples") if path.is_file() else None
    if found is None and gate_of(read(run)) == "router":
        raise FileNotFoundError(
            f"{path} with examples token by token is not there: the run was not scored, or by an "
            f"older version of manylora; make them with `manylora eval {run}`"
        )
    return found
