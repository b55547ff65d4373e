"""What autograd and torch.compile see of `ops.linear`, and what is kept for the backward pass.

Kept are x, z and the mixing weights that were given; x not where it can be computed again. In eager
mode that is found from x itself (recompute.py). Under torch.compile its partitioner decides, which
never computes again what a backward operation reads from memory: there x goes through a choice that
depends on dz and gives x either way, so that computing it again counts as work of the backward pass
and is fused with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manylora.adapter import ops
from manylora.adapter.recompute import computed_again, watched


def apply(
    x: Tensor,
    bases: list[Tensor],
    biases: list[Tensor],
    dense: bool,
    downs: list[Tensor],
    ups: list[list[Tensor]],
    weights: Tensor | None,
    router: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
    factors: tuple[Tensor, ...] = (),
) -> Sequence[Tensor]:
    """`ops.linear`, by the shortest way that there is.

    downs: the rows of P, in any dtype. ups: the columns of each Q_j. factors: of x, kept instead
    of it.
    """
    rest = weights, router, seed, *numbers
    if torch.compiler.is_compiling():
        return ops.linear(x, bases, biases, dense, *_put_together(x, downs, ups), *rest)
    if not torch.is_grad_enabled():
        return ops.forward(x, bases, biases, dense, *_put_together(x, downs, ups), *rest)
    with torch.no_grad():  # the step splits their gradients itself, in less time
        down, own_ups = _put_together(x, downs, ups)
    parts = [*downs, *(one for own in ups for one in own)]
    given = Given(dense, len(ups), len(biases), len(downs), factors, numbers)
    step = _linear_in_two_steps if watched() else _Linear.apply
    return step(given, x, down, weights, router, seed, *bases, *own_ups, *biases, *parts)


class Given(NamedTuple):
    """What `_Linear` is given besides tensors.

    ups, biases, downs: how many. factors: of x. numbers: the last arguments of `ops.linear`.
    """

    dense: bool
    ups: int
    biases: int
    downs: int
    factors: tuple[Tensor, ...]
    numbers: tuple[Any, ...]

    def inputs(self, x: Tensor, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        """The arguments of `ops.linear`, and what P and Q were put together from."""
        down, weights, router, seed, *others = tensors
        ends = [self.ups, 2 * self.ups, 2 * self.ups + self.biases]
        bases, ups, biases = others[: ends[0]], others[ends[0] : ends[1]], others[ends[1] : ends[2]]
        rest = weights, router, seed, *self.numbers
        return (x, bases, biases, self.dense, down, ups, *rest), others[ends[2] :]


def multiple(x: Tensor) -> int:
    """Of rows of P: 16 bytes in half precision, which a GPU's fast products want."""
    return 8 if x.is_cuda else 1


def _put_together(
    x: Tensor, downs: list[Tensor], ups: list[list[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """P, padded to a multiple of rows, and each Q_j; in x's dtype."""
    rows, short = downs, -sum(map(len, downs)) % multiple(x)
    if short:
        rows = [*downs, downs[0].new_zeros(short, x.shape[1])]
    together = [own[0] if len(own) == 1 else torch.cat(own, 1) for own in ups]
    down = rows[0] if len(rows) == 1 else torch.cat(rows)
    return down.to(x.dtype), [own.to(x.dtype) for own in together]  # cast last: fewer casts


class _Linear(torch.autograd.Function):
    """`ops.linear` without what torch does to a registered operation's lists, which takes longer
    than its own dispatch; gives gradients to what P and Q were put together from, not to these.
    """

    @staticmethod
    def forward(ctx: Any, given: Given, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        inputs, parts = given.inputs(x, tensors)
        *ys, z = ops.forward(*inputs)
        _keep(ctx, inputs, z, given.factors)
        _keep_parts(ctx, given, parts)
        return (*ys, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = _gradients(ctx, list(grads), ops.backward, _computed_again, ops.backward_down)
        dx, bases, biases, _, ddown, dups, dweights, drouter, *_ = found
        parts = _of_parts(ctx, ddown, dups)
        none = [None] * len(dups)
        return (None, dx, None, dweights, drouter, None, *bases, *none, *biases, *parts)


def _keep_parts(ctx: Any, given: Given, parts: list[Tensor]) -> None:
    """How many rows of P, or columns of Q, each is, and its dtype."""
    sizes = [one.shape[place >= given.downs] for place, one in enumerate(parts)]
    ctx.rows, ctx.columns = sizes[: given.downs], sizes[given.downs :]
    ctx.dtypes = [one.dtype for one in parts]


def _of_parts(ctx: Any, ddown: Tensor, dups: list[Tensor]) -> list[Tensor]:
    rows, own = ctx.rows, len(ctx.columns) // len(dups)
    if len({*ctx.dtypes[: len(rows)]}) == 1:
        ddown = ddown.to(ctx.dtypes[0])  # at once
    grads = list(ddown.split([*rows, len(ddown) - sum(rows)])[: len(rows)])
    for j, dup in enumerate(dups):
        grads += dup.split(ctx.columns[j * own : (j + 1) * own], 1) if own > 1 else [dup]
    return [one.to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)]


def _linear_in_two_steps(given: Given, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    """`_Linear` that keeps all it keeps before it multiplies by W.

    A checkpoint computes a block again only until all that was kept is there, so the last product
    of the block, a fourth of its work, is not done again, as in a model without adapters.
    """
    factors: list[float] = []
    *places, z, u = _Inside.apply(given, factors, x, *tensors)
    others = tensors[4 : 4 + 2 * given.ups + given.biases]
    ys = _Outputs.apply(given.ups, given.dense, *factors, x, u, *places, *others)
    return (*ys, z)


class _Inside(torch.autograd.Function):
    """z, u, and the gradients of all; instead of y_j an empty place for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, given: Given, said: list[float], x: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        inputs, parts = given.inputs(x, tensors)
        _, _, _, _, down, ups, weights, router, seed, *numbers = inputs
        z, u, factor = ops.hidden(x, down, len(ups), weights, router, seed, *numbers)
        said.append(factor)  # of u
        _keep(ctx, inputs, z, given.factors)
        _keep_parts(ctx, given, parts)
        ctx.mark_non_differentiable(u)
        places = [x.new_empty(1).expand(len(x), up.shape[0]) for up in ups]
        return (*places, z, u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *_Linear.backward(ctx, *grads[:-1]))


class _Outputs(torch.autograd.Function):
    """y_1, ..., y_n; keeps nothing, and hands each gradient to its place in `_Inside`."""

    @staticmethod
    def forward(
        ctx: Any, n: int, dense: bool, factor: float, x: Tensor, u: Tensor, *rest: Any
    ) -> Any:
        bases, ups, biases = rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        ctx.unused = len(rest) - n
        ctx.set_materialize_grads(False)
        return tuple(ops.outputs(x, list(bases), list(biases), dense, list(ups), u, factor))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        return (None, None, None, None, None, *dys, *[None] * ctx.unused)


def _keep(ctx: Any, inputs: tuple[Any, ...], z: Tensor, factors: tuple[Tensor, ...] = ()) -> None:
    x, bases, biases, dense, down, ups, weights, router, seed, *rest = inputs
    ctx.rest, ctx.dense, ctx.biases = rest, dense, len(biases)
    ctx.wants_x = x.requires_grad
    ctx.wants_weights = weights is not None and weights.requires_grad
    kept = bases if dense else []
    ctx.shape, ctx.factors = x.shape, len(factors)
    own = (z, down, weights, router, seed, *kept, *ups)
    ctx.save_for_backward(*(factors or (x,)), *own)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: list[Tensor], through: Any, x_of: Any, of_down: Any) -> Any:
    """In the order of `ops.linear`'s arguments; x is asked for when all else is done."""
    saved, own = ctx.saved_tensors, max(1, ctx.factors)  # a checkpoint hands them out once
    factors, (z, down, weights, router, seed, *others) = saved[:own], saved[own:]
    *dys, dz = grads
    n = len(dys)
    if any(dy is None for dy in dys):  # outputs that nothing was made of
        widths = [up.shape[0] for up in others[-n:]]
        dys = [
            z.new_zeros(len(z), width) if dy is None else dy
            for dy, width in zip(dys, widths, strict=True)
        ]
    dx, dz, *more = through(
        dys, dz, z, others[:-n], down, others[-n:], weights, router, seed, *ctx.rest, ctx.wants_x
    )
    layout, *_, dropout = ctx.rest
    return (
        dx if ctx.wants_x else None,
        [None] * n if ctx.dense else dys,
        [None] * ctx.biases,
        None,
        of_down(dz, x_of(ctx, factors, dz), seed, layout, dropout),
        more[:n],
        more[n] if ctx.wants_weights else None,
        None if router is None else more[n + 1],
        *[None] * 5,
    )


def _computed_again(ctx: Any, factors: tuple[Tensor, ...], dz: Tensor) -> Tensor:
    if not ctx.factors:
        return factors[0]
    return computed_again(factors).reshape(ctx.shape).to(dz.dtype)


def _as_backward_work(ctx: Any, factors: tuple[Tensor, ...], dz: Tensor) -> Tensor:
    (x,) = factors
    return torch.where(dz[:1, :1] > 0, x, x)


def _traced_keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _keep(ctx, inputs, output[-1])


def _traced_backward(ctx: Any, grads: list[Tensor]) -> Any:
    through, of_down = ops.linear_gradients, ops.down_gradient
    return _gradients(ctx, grads, through, _as_backward_work, of_down)


torch.library.register_autograd("manylora::linear", _traced_backward, setup_context=_traced_keep)
