"""The configuration of a manylora adapter, as PEFT saves and loads it.

Fields that `peft.LoraConfig` has keep its names and meaning. `branches_of` makes the configuration
concrete for one layer. The file format is versioned: an adapter written by a newer manylora is
refused here, because PEFT itself only warns about fields it does not know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from manylora.adapter.checking import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    SavedAdapter,
    check_config,
    check_selector,
    check_weights,
    file_inside,
)
from manylora.adapter.saved_config import AdapterFileError, printable
from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.methods import Branches, Gate, RouterInput, resolve

FORMAT_VERSION = 1
# What PEFT puts into modules_to_save for a task; of DistilBERT it takes pre_classifier with it.
HEADS = {
    "SEQ_CLS": ("classifier", "pre_classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class ManyLoraPeftType(str, enum.Enum):  # noqa: UP042  (PEFT formats it with str(); StrEnum differs)
    """PEFT's own enum is closed; a str enum whose name is its value works wherever PEFT looks."""

    MANYLORA = "MANYLORA"


@dataclass
class ManyLoraConfig(PeftConfig):
    """Configuration of MultiLoRA, HydraLoRA, LoRA-Split, LoRA-MoE and their relatives.

    Args:
        method: row of `manylora.methods.METHODS`.
        r: rank of each branch.
        num_branches: how many branches; None is the method's own default (3 where it has several).
        lora_alpha: s = lora_alpha / r, and lora_alpha / shared_rank for the shared branch.
        lora_dropout: dropout on the input of A (never on the router's).
        dropout_per_branch: one mask for each branch, as the HydraLoRA authors' code; default one
            mask for all, as the paper's shared A implies.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
        alpha_pattern, use_rslora, bias, modules_to_save, trainable_token_indices: as LoraConfig.
        shared_rank: rank of the branch that is always on; 0 is none.
        branch_dropout: share of the training sequences that go to the shared branch alone, so that
            it can answer a prompt that no branch is for (gate "one_hot" with a shared branch).
        branch_ranks: a rank per branch, for methods with their own A and B per branch; s stays
            lora_alpha / r.
        gate: overrides the method's mixing weights: "ones", "uniform" (1/N, an ablation of
            HydraLoRA's table 5), "router", "task", "one_hot".
        num_tasks: rows of the learned gate when gate="task".
        router_input: "x" (the HydraLoRA authors' code) or "Ax" (equation 5 read literally).
        share_A, share_B: override which factor the branches share.
        init_A: "kaiming", or "normal" (std 0.02, MoLoRA) for A and router.
        init_weights: False gives a random B and scale, so that the adapter is not the identity.
        balance_loss: None, "cv_squared" (LoRAMoE) or "switch" (Switch Transformer), added to the
            training loss by `manylora.ManyLoraTrainerMixin` or `manylora.balance_loss(model)`.
        balance_weight: its coefficient.
        selector: whether a branch selector is saved beside the weights (set by training).
        format_version: of the saved adapter.

    Raises:
        ValueError: a value that does not fit, naming the field, the value and what would.
    """

    method: str = "hydralora"
    r: int = 8
    num_branches: int | None = None
    lora_alpha: int | float = 16
    lora_dropout: float = 0.0
    dropout_per_branch: bool = False
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    shared_rank: int = 0
    branch_dropout: float = 0.0
    branch_ranks: list[int] | None = None
    gate: Gate | None = None
    num_tasks: int | None = None
    router_input: RouterInput = "x"
    share_A: bool | None = None
    share_B: bool = False
    init_A: Literal["kaiming", "normal"] = "kaiming"
    init_weights: bool = True
    balance_loss: Literal["cv_squared", "switch"] | None = None
    balance_weight: float = 0.01
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "manylora_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    selector: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ManyLoraPeftType.MANYLORA
        self.branch_selector: BranchSelector | None = None
        self.saved: SavedAdapter | None = None
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format_version={self.format_version}, newer than the "
                f"{FORMAT_VERSION} that this manylora reads; update it: pip install -U manylora"
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._leave_out_heads()
        self._check()

    def _leave_out_heads(self) -> None:
        """Of "all-linear", what PEFT trains whole for the task: it cannot be adapted too."""
        heads = HEADS.get(str(getattr(self.task_type, "value", self.task_type)))
        if heads is None or str(self.target_modules).lower() != "all-linear":
            return
        given = self.exclude_modules or []
        if isinstance(given, str):
            self.exclude_modules = rf"(?:{given})|(?:.*\.)?(?:{'|'.join(heads)})"
        else:
            self.exclude_modules = {*given, *heads}  # type: ignore[assignment]

    def _check(self) -> None:
        branches = resolve(self.method, **self._structure(self.r))
        for name, known in (
            ("init_A", ("kaiming", "normal")),
            ("balance_loss", (None, "cv_squared", "switch")),
            ("bias", ("none", "all", "manylora_only")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name}={getattr(self, name)!r}; it is one of {known}")
        for name in ("lora_dropout", "branch_dropout"):
            share = getattr(self, name)
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not (number and 0.0 <= share < 1.0):
                raise ValueError(f"{name}={share!r} must be in [0, 1), a number")
        if self.branch_dropout and not (branches.gate == "one_hot" and branches.shared_rank):
            raise ValueError(
                f"branch_dropout={self.branch_dropout} leaves some to the shared branch alone, but "
                f"gate={branches.gate!r} with shared_rank={branches.shared_rank} chooses no "
                "branch beside one; give gate='one_hot' and a shared_rank, or leave it out"
            )
        if self.balance_loss is not None and branches.gate != "router":
            raise ValueError(
                f"balance_loss={self.balance_loss!r} balances a router's branches, but "
                f"method={self.method!r} with gate={branches.gate!r} has no router"
            )
        if self.branch_ranks is not None and self.rank_pattern:
            raise ValueError(
                f"branch_ranks={self.branch_ranks} and rank_pattern="
                f"{self.rank_pattern} both set the ranks; give one of them"
            )
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError(f"rank_pattern={self.rank_pattern}: ranks must be at least 1")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, "
                "as in LoraConfig"
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be used when "
                        f"target_modules={self.target_modules!r} is a regex string"
                    )

    def _structure(self, r: int) -> dict[str, Any]:
        return {
            "r": r,
            "num_branches": self.num_branches,
            "branch_ranks": self.branch_ranks,
            "gate": self.gate,
            "share_A": self.share_A,
            "share_B": self.share_B,
            "router_input": self.router_input,
            "shared_rank": self.shared_rank,
            "num_tasks": self.num_tasks,
        }

    def branches_of(self, layer: str = "") -> Branches:
        """The branch structure of the layer of that name, rank_pattern applied."""
        return resolve(self.method, **self._structure(self._rank(layer)))

    def scalings_of(self, layer: str = "") -> tuple[float, float]:
        """(s, s0) of the layer of that name, alpha_pattern and rsLoRA applied."""
        key = get_pattern_key(list(self.alpha_pattern), layer)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        power = 0.5 if self.use_rslora else 1.0
        s = alpha / self._rank(layer) ** power
        s0 = alpha / self.shared_rank**power if self.shared_rank else 0.0
        return s, s0

    def _rank(self, layer: str) -> int:
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, where there is one, the branch selector beside it."""
        self.selector = self.branch_selector is not None
        super().save_pretrained(save_directory, **kwargs)
        if self.branch_selector is not None:
            self.branch_selector.save(Path(save_directory) / SELECTOR_FILE)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ManyLoraConfig:
        """Read the configuration and, where the adapter needs it, its branch selector.

        In a local folder every file is checked before it is read, the weights against the
        configuration too: `AdapterFileError` names the file and what to do.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        local = (folder / CONFIG_FILE).is_file()
        if local:
            check_config(folder)
        try:
            config: ManyLoraConfig = super().from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        except (ValueError, TypeError) as error:
            if not local:
                raise
            raise AdapterFileError(f"{folder / CONFIG_FILE}: {printable(error)}") from None
        if local:
            config._check_beside(folder)
        if config.selector:
            config.branch_selector = BranchSelector.load_beside(
                pretrained_model_name_or_path, subfolder, kwargs.get("revision")
            )
        return config

    def _check_beside(self, folder: Path) -> None:
        """Selector and weights, where they are there: a configuration can be read alone."""
        if self.selector and (folder / SELECTOR_FILE).exists():
            check_selector(file_inside(folder, SELECTOR_FILE), self.branches_of().choices)
        if any((folder / name).exists() for name in (WEIGHTS_FILE, PICKLE_FILE)):
            self.saved = check_weights(folder, self)


@dataclass
class HydraLoraConfig(ManyLoraConfig):
    """`ManyLoraConfig(method="hydralora")`; saves and loads as ManyLoraConfig."""

    method: str = "hydralora"

    def __post_init__(self) -> None:
        _only(self, "hydralora")
        super().__post_init__()


@dataclass
class MultiLoraConfig(ManyLoraConfig):
    """`ManyLoraConfig(method="multilora")`; saves and loads as ManyLoraConfig."""

    method: str = "multilora"

    def __post_init__(self) -> None:
        _only(self, "multilora")
        super().__post_init__()


def _only(config: ManyLoraConfig, method: str) -> None:
    if config.method != method:
        raise ValueError(
            f"{type(config).__name__} is method={method!r}, got method={config.method!r}; "
            "use ManyLoraConfig for other methods"
        )
