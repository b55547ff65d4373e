"""The operation behind every layer: torch's own checks, compiled, shared by layers that read x."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manylora.adapter import autograd, ops, running
from manylora.adapter.ids import branch_ids
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.layout import Layout
from manylora.adapter.mixing import by_column
from manylora.adapter.recompute import factors_of
from manylora.methods import resolve
from tiny import attach, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "multilora": {"method": "multilora", "shared_rank": 2},
    "hydralora": {"method": "hydralora", "num_branches": 3},
    "hydralora on Ax": {"method": "hydralora", "router_input": "Ax"},
    "lora_moe uneven": {"method": "lora_moe", "branch_ranks": [1, 3, 2]},
    "cluster": {"method": "branch_per_cluster", "num_branches": 3},
    "cluster uneven": {"method": "branch_per_cluster", "branch_ranks": [1, 3, 2], "shared_rank": 2},
    "task gate": {"method": "lora_moe", "gate": "task", "num_tasks": 3},
}
by_kind = pytest.mark.parametrize("kind", list(KINDS))


def arguments(kind: str, n: int = 2, dense: bool = True) -> tuple[Any, ...]:
    """Of `ops.linear`, with random numbers, for n layers of different widths."""
    torch.manual_seed(0)
    config = dict(KINDS[kind])
    branches = resolve(config.pop("method"), r=3, **config)
    layout = Layout.of(branches)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    widths = [7, 4, 5][:n]
    columns = branches.columns_B + branches.shared_rank
    weights = router = None
    if layout.gate == "given":
        weights = torch.rand(6, 1, branches.count, dtype=torch.float64, requires_grad=True)
    if branches.gate == "one_hot":  # as the layers of a model share them
        weights = by_column(weights.detach().round(), layout, 0.7, 1.3)
        layout = layout._replace(gate="columns")
    if layout.gate == "Ax":
        router = draw(n, branches.count, branches.rows_A)
    bases = [draw(w, 5, grad=False) if dense else draw(6, w) for w in widths]
    return (
        draw(6, 5),
        bases,
        [draw(w, grad=False) for w in widths] if dense else [],
        dense,
        draw(n * layout.block, 5),
        [draw(w, columns) for w in widths],
        weights,
        router,
        None,
        layout.encode(),
        0.7,
        1.3,
        0.0,
    )


@by_kind
@pytest.mark.parametrize("dense", [True, False])
def test_torch_finds_nothing_wrong_with_the_operation(kind: str, dense: bool) -> None:
    torch.library.opcheck(ops.linear, arguments(kind, dense=dense))


@by_kind
@pytest.mark.parametrize("dense", [True, False])
def test_its_gradients_are_those_of_finite_differences(kind: str, dense: bool) -> None:
    given = arguments(kind, dense=dense)

    def outputs(x: Tensor, down: Tensor, weights: Any, *ups: Tensor) -> tuple[Tensor, ...]:
        parts = [list(up.tensor_split(2, 1)) for up in ups]
        own = (x, *given[1:4], list(down.tensor_split(3)), parts, weights, *given[7:])
        return tuple(autograd.apply(*own))

    assert torch.autograd.gradcheck(outputs, (given[0], given[4], given[6], *given[5]))


def test_several_layers_at_once_are_each_layer_alone() -> None:
    for kind in KINDS:
        x, bases, biases, dense, down, ups, weights, router, *rest = arguments(kind, n=3)
        block = Layout.decode(rest[1]).block
        parts = [down], [[up] for up in ups]
        *together, _ = autograd.apply(x, bases, biases, dense, *parts, weights, router, *rest)
        for j in range(3):
            own = down[j * block : (j + 1) * block]
            mine = None if router is None else router[j : j + 1]
            alone, _ = autograd.apply(
                x, [bases[j]], [biases[j]], dense, [own], [[ups[j]]], weights, mine, *rest
            )
            torch.testing.assert_close(together[j], alone, rtol=0, atol=1e-13)


def model_of(kind: str, **more: Any) -> nn.Module:
    return attach(tiny_llama(), r=4, init_weights=False, **KINDS[kind], **more).train()


def loss_and_gradients(model: nn.Module, forward: Any = None) -> tuple[Tensor, list[Tensor]]:
    tokens = torch.arange(24).reshape(3, 8) + 3
    with branch_ids(model, [0, 2, 1]):
        out = (model if forward is None else forward)(input_ids=tokens, use_cache=False).logits
        loss = out.float().square().mean()
        loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.detach(), found


@by_kind
def test_compiled_whole_it_gives_the_same(kind: str) -> None:
    model = model_of(kind)
    loss, gradients = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, others = loss_and_gradients(model, compiled)
    torch.testing.assert_close(again, loss)
    assert len(others) == len(gradients)
    for mine, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@by_kind
def test_all_blocks_share_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model = model_of(kind)
    model.enable_input_require_grads()
    counter = torch._dynamo.testing.CompileCounter()
    for block in model.base_model.model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    loss_and_gradients(model)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "dropout",
    [{}, {"lora_dropout": 0.3}, {"lora_dropout": 0.3, "dropout_per_branch": True}],
    ids=["no dropout", "one mask", "own masks"],
)
@by_kind
def test_what_siblings_compute_for_each_other_is_what_each_computes(
    kind: str, dropout: dict[str, Any]
) -> None:
    shared = model_of(kind, **dropout).double()
    alone = copy.deepcopy(shared)
    assert [one.name for one in layers_of(shared)[0].siblings] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "kv"
    ]
    for layer in layers_of(alone):
        layer.siblings = []
    results = []
    for model in (shared, alone):
        torch.manual_seed(0)
        results.append(loss_and_gradients(model))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    for mine, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-13)


@by_kind
def test_compiled_it_takes_any_number_of_tokens_and_any_ids(kind: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    one = nn.Sequential(nn.Linear(8, 16))
    model = attach(one, r=4, init_weights=False, target_modules=["0"], **KINDS[kind]).train()
    model.get_base_model().compile(dynamic=True, backend=counter)
    compiled = []
    for size, ids in ((9, [0, 1]), (13, [2, 2]), (21, [1, 0])):
        with branch_ids(model, ids):
            model(torch.randn(2, size, 8, requires_grad=True)).square().mean().backward()
        compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1, compiled


def test_compiled_no_product_of_a_gated_layer_is_kept() -> None:
    """Two tensors of a block are as wide as its feed-forward layer, those that are multiplied."""
    torch._dynamo.reset()
    model = model_of("hydralora")
    model.enable_input_require_grads()
    for block in model.base_model.model.model.layers:
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradients(model)
    wide = {t.data_ptr() for t in kept if t.numel() == 24 * 48 and t.shape[-1] == 48}
    assert len(wide) == 2 * 2


def attention() -> tuple[nn.Module, list[ManyLoraLayer]]:
    model = model_of("hydralora").double()
    return model, layers_of(model)[:3]


def test_a_sibling_that_reads_something_else_computes_for_itself() -> None:
    _, (q, k, v) = attention()
    x, other = torch.randn(2, 4, 32).double(), torch.randn(2, 4, 32).double()
    expected = [layer(x) for layer in (q, k, v)]
    q(x)
    assert torch.equal(k(other), k(other.clone()))
    q(x)
    assert not torch.allclose(k(other), expected[1])
    # In any order, and each as often as one likes.
    for layer, y in zip((v, q, k), (expected[2], *expected[:2]), strict=True):
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


def test_a_tensor_changed_in_place_is_read_again() -> None:
    _, (q, k, _) = attention()
    x = torch.randn(2, 4, 32).double()
    with torch.no_grad():
        q(x)
        x += 1
        torch.testing.assert_close(k(x), k(x.clone()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["hook", "trained base", "disabled", "merged"])
def test_layers_that_are_more_than_a_product_are_left_out(change: str) -> None:
    model = model_of("multilora")
    q, k, _ = layers_of(model)[:3]
    calls: list[int] = []
    if change == "hook":
        k.base_layer.register_forward_hook(lambda *given: calls.append(1))
    if change == "trained base":
        k.base_layer.weight.requires_grad_(True)
    if change == "disabled":
        k.enable_adapters(False)
    if change == "merged":
        k.merge()
    x = torch.randn(2, 4, 32)
    assert not q.reads_as(k, "default", x)
    q(x)
    y = k(x)
    assert len(calls) == (1 if change == "hook" else 0)
    if change == "trained base":
        y.sum().backward()
        assert k.base_layer.weight.grad.any()


def test_siblings_under_checkpointing_give_the_same_gradients() -> None:
    model, (q, k, v) = attention()
    x = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return (q(x) * 2 + 1).sum() + k(x).square().sum() + v(x).square().sum()

    found = []
    for reentrant in (None, True, False):
        y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        y.backward()
        own = [p.grad.clone() for layer in (q, k, v) for p in layer.parameters() if p.requires_grad]
        found.append([x.grad.clone(), *own])
        x.grad = None
        model.zero_grad()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_checkpoint_does_not_compute_the_last_product_of_a_block_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("hydralora")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    given = ops.outputs

    def watched(x: Tensor, bases: list[Tensor], *rest: Any) -> Any:
        calls.append(len(bases))
        return given(x, bases, *rest)

    monkeypatch.setattr(ops, "outputs", watched)
    loss, gradients = loss_and_gradients(model)
    # Of q, k, v together, o, gate and up together, and down, whose output nothing needs again.
    assert calls == [3, 1, 2, 1] * 2 + [3, 1, 2] * 2
    model.gradient_checkpointing_disable()
    again, others = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_an_output_that_is_not_used_costs_no_gradient() -> None:
    _, (q, k, v) = attention()
    x = torch.randn(2, 4, 32).double()
    q(x).sum().backward()
    assert q.manylora_B["default"].weight.grad.any()
    assert not k.manylora_B["default"].weight.grad.any()
    assert not v.manylora_A["default"].weight.grad.any()


def test_nothing_of_a_forward_pass_is_copied_or_kept() -> None:
    model, (q, _, _) = attention()
    q(torch.randn(2, 4, 32).double())
    state = copy.deepcopy(model).base_model.branch_state.shared
    assert state.kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_computed_again_gives_the_same_bits_and_is_not_kept(
    dtype: torch.dtype, autocast: bool
) -> None:
    found, sizes = [], []
    for recompute in (False, True):
        model = attach(tiny_llama(), r=4, init_weights=False, **KINDS["hydralora"]).train()
        model.to(dtype)
        model.enable_input_require_grads()
        model.base_model.branch_state.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=torch.arange(24).reshape(3, 8) + 3, use_cache=False).logits
        sizes.append(kept_bytes(out))
        out.float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # Each of the two layers reads two norms (24 tokens, 32 wide) and a product (48 wide).
    cast = autocast and dtype != torch.float64  # which autocast leaves alone
    width = 2 if cast else torch.empty(0, dtype=dtype).element_size()
    assert sizes[0] - sizes[1] == 2 * 24 * (32 + 32 + 48) * width


def kept_bytes(out: Tensor) -> int:
    """Of the tensors that autograd keeps for a backward pass, each storage once."""
    kept: dict[int, int] = {}
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [one for one, _ in node.next_functions]
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names if not name.endswith("_raw_saved_tensors")]
        values += list(getattr(node, "saved_tensors", ()))
        for value in values:
            if isinstance(value, Tensor):
                kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(kept.values())


def test_a_checkpoint_s_tensors_are_left_to_it() -> None:
    x = torch.randn(4, requires_grad=True)
    product = (x * 2) * x.exp()
    assert factors_of(product) is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert factors_of(product) is None
    assert factors_of(x) is None and factors_of(x + 1) is None and factors_of(x * 3) is None


@pytest.mark.parametrize("ids", [[3], [3, 3, 3], [5, 1, 5], [-1, 2, -1], [-1, -1, -1]])
@pytest.mark.parametrize("method", ["branch_per_cluster", "multilora"])
def test_branches_that_a_batch_does_not_use_are_skipped_and_change_nothing(
    method: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    given = autograd.apply

    def watched(x: Tensor, *rest: Any, **more: Any) -> Any:
        widths.append(sum(map(len, rest[3][: len(rest[3]) // len(rest[0])])))
        return given(x, *rest, **more)

    monkeypatch.setattr(autograd, "apply", watched)
    config = {"method": method, "num_branches": 6, "r": 3, "shared_rank": 2, "gate": "one_hot"}
    found = []
    for skipping in (True, False):
        model = attach(tiny_llama(), init_weights=False, **config).double()
        if not skipping:
            monkeypatch.setattr(running, "_used", lambda *given: None)
        with branch_ids(model, ids):
            out = model(input_ids=torch.arange(24).reshape(3, 8) + 3, use_cache=False).logits
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        whole = 6 * 3 + 2
        few = len({k for k in ids if k >= 0}) * 3 + 2
        assert widths[-1] == (few if skipping and few > 2 else whole)
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)
