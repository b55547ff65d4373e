"""The table of methods, what each one holds, and what it costs.

Every method is one row over one equation (docs/design.md: x a token, W frozen, s = alpha / r):

    y = W x + s * B [ g(x) (x) A x ]  ( + s0 * B0 A0 x )

A row says which of A and B the branches share, where the mixing weights g come from, where B
starts, and whether each branch carries a trained scale. `Branches` is a row made concrete for one
adapted layer; its `shapes` are the only place that knows which tensors exist, so creating them,
counting them and solving for a rank cannot disagree.

Sources: LoRA 2106.09685; MultiLoRA 2311.11501; HydraLoRA 2404.19245 (LoRA-Split: its section 2);
LoRAMoE 2312.09979; MoLoRA 2309.05444; MOELoRA 2310.18339 and MTL-LoRA 2410.09437 (task gate).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Gate = Literal["ones", "uniform", "router", "task", "one_hot"]
RouterInput = Literal["x", "Ax"]

GATES: tuple[Gate, ...] = get_args(Gate)
PREFIX = "manylora_"
MOST_BRANCHES = 4096


@dataclass(frozen=True)
class Method:
    """One row of the table.

    gate: "ones" g = 1; "uniform" g = 1/N; "router" g = softmax(R x) per token; "task" g =
    softmax(row of the example's task); "one_hot" g picks the branch of the example's id.
    """

    share_A: bool
    gate: Gate
    branches: int
    init_B: Literal["zeros", "kaiming"] = "zeros"
    scaled: bool = False
    paper: str = ""


METHODS: dict[str, Method] = {
    "lora": Method(False, "ones", 1, paper="2106.09685"),
    "lora_split": Method(False, "ones", 3, paper="2404.19245, section 2"),
    "multilora": Method(False, "ones", 3, init_B="kaiming", scaled=True, paper="2311.11501"),
    "hydralora": Method(True, "router", 3, paper="2404.19245"),
    "lora_moe": Method(False, "router", 3, paper="2312.09979, 2309.05444"),
    "branch_per_cluster": Method(False, "one_hot", 3, paper="docs/research.md"),
}


@dataclass(frozen=True)
class Branches:
    """The branch structure of one adapted layer, with everything but the layer's own sizes.

    ranks: rank of each branch, in order; equal unless branch ranks were given.
    num_tasks: rows of the learned gate (gate "task" only).
    """

    ranks: tuple[int, ...]
    share_A: bool
    share_B: bool
    gate: Gate
    router_input: RouterInput = "x"
    scaled: bool = False
    shared_rank: int = 0
    num_tasks: int = 0

    @property
    def count(self) -> int:
        return len(self.ranks)

    @property
    def equal_ranks(self) -> bool:
        return len(set(self.ranks)) == 1

    @property
    def rows_A(self) -> int:
        return self.ranks[0] if self.share_A else sum(self.ranks)

    @property
    def columns_B(self) -> int:
        return self.ranks[0] if self.share_B else sum(self.ranks)

    @property
    def needs_ids(self) -> bool:
        """Whether the weights depend on which task or cluster an example belongs to."""
        return self.gate in ("task", "one_hot")

    @property
    def choices(self) -> int:
        """How many ids there are to choose from: tasks for a learned gate, else branches."""
        return self.num_tasks if self.gate == "task" else self.count

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
        """Name (without prefix) to shape of each trained tensor on a layer of the given size."""
        shapes = {"A": (self.rows_A, in_features), "B": (out_features, self.columns_B)}
        if self.gate == "router":
            width = in_features if self.router_input == "x" else self.rows_A
            shapes["router"] = (self.count, width)
        if self.scaled:
            shapes["scale"] = (self.count, out_features)
        if self.gate == "task":
            shapes["gate"] = (self.num_tasks, self.count)
        if self.shared_rank:
            shapes["shared_A"] = (self.shared_rank, in_features)
            shapes["shared_B"] = (out_features, self.shared_rank)
        return shapes

    def parameters(self, in_features: int, out_features: int) -> int:
        return sum(rows * cols for rows, cols in self.shapes(in_features, out_features).values())


def resolve(
    method: str,
    *,
    r: int = 8,
    num_branches: int | None = None,
    branch_ranks: list[int] | None = None,
    gate: Gate | None = None,
    share_A: bool | None = None,
    share_B: bool = False,
    router_input: RouterInput = "x",
    shared_rank: int = 0,
    num_tasks: int | None = None,
) -> Branches:
    """Make a row of the table concrete; `None` means the method's own value.

    Raises ValueError naming the field, its value and what would be accepted.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method={method!r}; known methods: {', '.join(METHODS)}")
    row = METHODS[method]
    ranks = _ranks(method, row, r, num_branches, branch_ranks)
    gate = row.gate if gate is None else gate
    share_A = row.share_A if share_A is None else share_A
    if gate not in GATES:
        raise ValueError(f"unknown gate={gate!r}; known gates: {', '.join(GATES)}")
    if router_input not in get_args(RouterInput):
        raise ValueError(f"unknown router_input={router_input!r}; it is 'x' or 'Ax'")
    if method == "lora" and (share_A or share_B or gate != "ones"):
        raise ValueError(
            f"method='lora' has one branch that is always on, so gate={gate!r}, share_A={share_A}, "
            f"share_B={share_B} do not apply; leave them out, or use method='lora_split'"
        )
    if share_A and share_B:
        raise ValueError("share_A=True and share_B=True: the branches would not differ at all")
    if (share_A or share_B) and len(set(ranks)) > 1:
        raise ValueError(
            f"branch_ranks={list(ranks)} differ, but method={method!r} shares "
            f"{'A' if share_A else 'B'} among its branches, which then have one rank; "
            "give equal ranks, or use a method with its own A and B per branch (lora_split, "
            "multilora, lora_moe, branch_per_cluster)"
        )
    if share_B and row.scaled:
        raise ValueError(
            f"method={method!r} scales each branch's B, so share_B=True does not apply"
        )
    if shared_rank < 0:
        raise ValueError(f"shared_rank={shared_rank} is negative; 0 means no shared branch")
    if gate == "task" and (num_tasks is None or num_tasks < 1):
        raise ValueError(f"gate='task' learns one row per task: set num_tasks (got {num_tasks})")
    if gate != "task" and num_tasks is not None:
        raise ValueError(
            f"num_tasks={num_tasks} is for gate='task', got gate={gate!r}; leave it out"
        )
    if gate != "router" and router_input != "x":
        raise ValueError(f"router_input={router_input!r}, but gate={gate!r} has no router")
    tasks = num_tasks or 0
    return Branches(ranks, share_A, share_B, gate, router_input, row.scaled, shared_rank, tasks)


def _ranks(
    method: str, row: Method, r: int, num_branches: int | None, branch_ranks: list[int] | None
) -> tuple[int, ...]:
    if method == "lora" and (num_branches or 1) != 1:
        raise ValueError(
            f"method='lora' has one branch, got num_branches={num_branches}; "
            "method='lora_split' is plain LoRA with several branches"
        )
    if branch_ranks is None:
        count = row.branches if num_branches is None else num_branches
        if not 1 <= count <= MOST_BRANCHES:
            raise ValueError(f"num_branches={count} must be in 1..{MOST_BRANCHES}")
        branch_ranks = [r] * count
    elif num_branches is not None and num_branches != len(branch_ranks):
        raise ValueError(
            f"num_branches={num_branches}, but branch_ranks={branch_ranks} names "
            f"{len(branch_ranks)} branches; leave num_branches out"
        )
    elif not branch_ranks or (method == "lora" and len(branch_ranks) != 1):
        raise ValueError(f"branch_ranks={branch_ranks} does not fit method={method!r}")
    if any(rank < 1 for rank in branch_ranks) or r < 1:
        raise ValueError(f"ranks must be at least 1, got r={r}, branch ranks {list(branch_ranks)}")
    return tuple(branch_ranks)


def count_parameters(branches: Branches, layers: Iterable[tuple[int, int]]) -> int:
    """Trained parameters over `layers`, pairs (in_features, out_features).

    Router, gate, scales and shared branch are counted (HydraLoRA's table 2 leaves its router out).
    """
    return sum(branches.parameters(n_in, n_out) for n_in, n_out in layers)


def rank_for_budget(
    budget: int, layers: Iterable[tuple[int, int]], method: str = "lora", **fields: object
) -> int:
    """The largest r with which `method` has at most `budget` trained parameters over `layers`.

    `fields` are those of `resolve` but r. Raises ValueError when even r = 1 is over the budget.
    """
    sizes = list(layers)

    def cost(r: int) -> int:
        return count_parameters(resolve(method, r=r, **fields), sizes)  # type: ignore[arg-type]

    if fields.get("branch_ranks") is not None:
        raise ValueError(
            "branch_ranks fixes the ranks, so there is none to solve for; leave it out"
        )
    # The cost is linear in r, so two values give the answer without a search.
    first, step = cost(1), cost(2) - cost(1)
    if first > budget:
        raise ValueError(
            f"method={method!r} needs {first:,} parameters at r=1, over the budget of {budget:,}; "
            "use fewer branches, fewer target modules, or a larger budget"
        )
    return 1 + (budget - first) // step
