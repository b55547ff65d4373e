"""The adapter's operations opened into their parts, inside compiled blocks of a small model.

To torch.compile an operation of `adapter/ops.py` is one call, and its parts are started from Python
one by one, some adding to a large product in place. In a small model that is what a step waits for.
There the compiler is given the parts: the same functions, traced, after it has settled what is kept
for the backward pass. In a large one the additions in place are worth more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    CallFunctionVarArgs,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.utils import _pytree as pytree

from manylora.adapter import layout, masks, mixing, ops
from manylora.adapter.layout import Layout

_OPENED: dict[Any, Callable[..., Any]] = {
    ops.linear: ops.forward,
    ops.linear_gradients: ops.backward,
    ops.down_gradient: ops.backward_down,
}
_SMALL = 2048 * 2048  # numbers of a base layer's weight


class Opened(CustomGraphPass):
    """A pass of the compiler over a graph, forwards or backwards."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        _patterns.apply(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """Of what a graph that is kept on disk was made by."""
        return get_hash_for_files(
            (__file__, *(str(one.__file__) for one in (layout, masks, mixing, ops)))
        )


def _may_open(match: Match) -> bool:
    """Not with masks, which are drawn, nor with uneven ranks that need a constant, nor if large."""
    (node,) = match.nodes
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=True))
    lay = Layout.decode(given["layout"])
    plain = lay.only_scales or lay.gate == "columns" or lay.even
    sizes = [base.meta["val"].numel() for base in given.get("bases", [])]
    return given["seed"] is None and plain and max(sizes, default=0) <= _SMALL


def _open(match: Match, *args: Any) -> None:
    """The operation's node replaced by what its function does, without writing in place."""
    function = _OPENED[match.nodes[0].target]
    flat, spec = pytree.tree_flatten(args)
    places = [i for i, one in enumerate(flat) if isinstance(one, torch.fx.Node)]

    def parts(*tensors: Any) -> Any:
        given = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        return function(*pytree.tree_unflatten(given, spec))

    in_new = torch.func.functionalize(parts, remove="mutations")
    with mixing.without_kernels():
        match.replace_by_example(in_new, [flat[i] for i in places])


_patterns = PatternMatcherPass("manylora_opened")
for _operation in _OPENED:
    register_graph_pattern(
        CallFunctionVarArgs(_operation), extra_check=_may_open, pass_dict=_patterns
    )(_open)
