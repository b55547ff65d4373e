"""Starting a run from a trained adapter (`start_from`): train on, add a task, add a branch.

    start = read_start(folder)             # a run folder, or one of its checkpoints
    recipe = inherit(recipe, start)        # what the recipe leaves out is as it was there
    tasks = task_order(start, tasks)       # known tasks keep their ids, new ones come after
    start_from(start, model)               # its weights, in a fresh adapter that may be larger

Only the weights are carried over: the optimizer and its schedule start anew, as in any new run. The
folder is read, never written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.grow import grow
from manylora.adapter.selector import BranchSelector
from manylora.inspect.routing import ROUTING_FILE, read_routing
from manylora.methods import Branches
from manylora.recipe import RECIPE_FILE, Recipe, load_recipe, parse_recipe
from manylora.train_recipe import TrainRecipe
from manylora.training.optimizer import Part, parts_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_INHERITED = ("model", "dtype", "quantize")


@dataclass(frozen=True)
class Start:
    """A trained adapter: its folder, the recipe of its run, its configuration.

    routing: mean routing weights of its branches for each layer, where the run measured them.
    """

    folder: Path
    recipe: Recipe
    config: ManyLoraConfig
    routing: dict[str, list[float]] | None

    @property
    def tasks(self) -> list[str]:
        """Its tasks in the order of their ids; none where ids mean nothing to its method."""
        selector = self.config.branch_selector
        return [] if selector is None else selector.names


def read_start(folder: Path) -> Start:
    """Read a run folder or a checkpoint folder of one, but for the weights.

    Raises FileNotFoundError when it is neither, or the run has not finished.
    """
    run = next((f for f in (folder, *folder.resolve().parents[:3]) if _is_run(f)), None)
    if run is None:
        raise FileNotFoundError(
            f"start_from={folder}: there is no {RECIPE_FILE} in it or above it; give the folder of "
            "a finished run, or a checkpoint folder inside one"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            found = [file.parent for file in folder.glob(f"checkpoints/*/{WEIGHTS_FILE}")]
            newest = max(found, key=lambda f: f.stat().st_mtime, default=None)
            instead = f"start from its checkpoint {newest}" if newest else "give a finished run"
            raise FileNotFoundError(
                f"start_from={folder}: {name} is missing, so this is not a finished run; {instead}"
            )
    config = ManyLoraConfig.from_pretrained(str(folder))
    return Start(folder, load_recipe(run), config, _mean_routing(run))


def inherit(recipe: Recipe, start: Start) -> Recipe:
    """The recipe with the old run's base model and adapter where it says nothing else.

    Call it on the recipe as given, before `resolved`, which sets keys itself. A one-hot gate gets
    its number of branches from the tasks again.
    """
    values = recipe.model_dump(exclude_unset=True)
    for key in _INHERITED:
        values.setdefault(key, getattr(start.recipe, key))
    adapter = start.recipe.adapter.model_dump()
    if start.config.branches_of().gate == "one_hot":
        adapter["num_branches"] = None
    values["adapter"] = adapter | values.get("adapter", {})
    return parse_recipe(values, f"the recipe, with what it takes from {start.folder},")


def task_order(start: Start, tasks: Sequence[str]) -> list[str]:
    """The order of task ids: the old run's tasks first, also those without data now."""
    return start.tasks + [task for task in tasks if task not in start.tasks]


def start_from(start: Start, recipe: Recipe, model: PeftModel, adapter: str = "default") -> None:
    """Put the old adapter's weights into the fresh adapter of `model`.

    Raises ValueError, saying which field differs and both values, when it does not fit.
    """
    if start.recipe.model != recipe.model:
        raise ValueError(
            f"start_from={start.folder}: its adapter was trained on another base model:\n"
            f"  model: {start.recipe.model!r} there, {recipe.model!r} here"
        )
    tensors = load_file(str(start.folder / WEIGHTS_FILE))
    try:
        grow(model, start.config, tensors, start.routing, adapter)
    except ValueError as error:
        raise ValueError(f"start_from={start.folder}: {error}") from None


def selector_for(
    start: Start, prompts: Sequence[Sequence[int]], owners: Sequence[int], tasks: Sequence[str]
) -> BranchSelector:
    """The selector of the new run; `owners` are places in `tasks`, which are in `task_order`.

    Learned anew when every task has prompts, else the old one with the new tasks added.
    """
    old = start.config.branch_selector
    if old is None or set(owners) == set(range(len(tasks))):
        return BranchSelector.fit(prompts, owners, tasks)
    count = len(old.names)
    if count == len(tasks):
        return old
    new = [(p, owner - count) for p, owner in zip(prompts, owners, strict=True) if owner >= count]
    return old.extended([p for p, _ in new], [owner for _, owner in new], tasks[count:])


def forgetting(config: ManyLoraConfig, train: TrainRecipe, absent: Sequence[str]) -> str | None:
    """Why tasks without a row to train on change what they have learned; None when they do not."""
    own = _own_parts(config.branches_of())
    trained = [part for part in parts_of(config) if train.rates.get(part) != 0]
    shared = [part for part in trained if part not in own]
    decays = {part: train.weight_decays.get(part, train.weight_decay) for part in trained}
    decayed = [part for part in trained if part in own and decays[part] > 0]
    if not absent or not (shared or decayed):
        return None
    keep = [f"train.rates.{part}=0" for part in shared]
    keep += [f"train.weight_decays.{part}=0" for part in decayed]
    moving = " and ".join(
        [f"training {', '.join(shared)}, which all tasks share,"] * bool(shared)
        + [f"the decay of {', '.join(decayed)}"] * bool(decayed)
    )
    instead = f"set {' '.join(keep)}, or " if shared != trained else ""
    return (
        f"{', '.join(absent)}: there is no row to train on, and {moving} changes what was learned; "
        f"to keep it {instead}give their data too"
    )


def _own_parts(branches: Branches) -> set[Part]:
    """The parts of which each task has its own block, that others' examples do not reach."""
    if branches.gate == "task":
        return {"gate"}
    if branches.gate != "one_hot":
        return set()
    own: set[Part] = {"scale"}
    own |= set() if branches.share_A else {"A"}
    return own | (set() if branches.share_B else {"B"})


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def _mean_routing(run: Path) -> dict[str, list[float]] | None:
    """For each layer the mean over tasks of its routing weights."""
    if not (run / ROUTING_FILE).is_file():
        return None
    routing = read_routing(run)
    means = torch.tensor(list(routing["tasks"].values())).mean(0)
    return dict(zip(routing["layers"], means.tolist(), strict=True))
