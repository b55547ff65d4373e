"""What is installed, what this machine can do, and what would stop a recipe before it is run.

Nothing is downloaded, and nothing written but the rows, into the cache. The memory of a recipe is
an estimate (`memory.py`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console

from manylora.base import DEFAULT_MODEL, BaseModelError
from manylora.base.state import bytes_still_needed, examine_model, local_folder
from manylora.cache import cache_folder
from manylora.corpus import Corpus, CorpusError
from manylora.discovery.show import headline
from manylora.findings import Finding, print_findings
from manylora.memory import Estimate, estimate, longest_rows
from manylora.precision import cpu_has_bf16, resolve_precision
from manylora.recipe import Recipe, RecipeError
from manylora.training.clusters import needs_discovery, settle

__all__ = ["Finding", "examine", "print_findings"]

_SHOWN = ("torch", "peft", "transformers", "trl", "accelerate", "datasets")
_RUN_NEEDS = 0.2e9


def examine(recipe: Recipe | None) -> list[Finding]:
    """Look at the installation and the machine and, with a recipe, at what it would run into."""
    model = DEFAULT_MODEL if recipe is None else recipe.model
    findings = [*_packages(), *_hardware(), *examine_model(model), *_disk(model, recipe)]
    if recipe is not None:
        findings += [*_settings(recipe), *_data(recipe)]
    return findings


def _packages() -> Iterator[Finding]:
    try:
        wanted = [Requirement(line) for line in requires("manylora") or []]
    except PackageNotFoundError:
        yield Finding(
            "packages",
            "problem",
            "manylora itself is not installed as a package",
            "pip install manylora",
        )
        return
    installed = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            state = "not installed" if found is None else f"{found}, outside the tested window"
            yield Finding(
                "packages",
                "problem",
                f"{requirement.name} is {state}; wanted {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        elif requirement.name in _SHOWN:
            installed.append(f"{requirement.name} {found}")
    yield Finding("packages", "ok", ", ".join([f"manylora {_version('manylora')}", *installed]))
    quantized = _version("bitsandbytes")
    yield Finding(
        "packages",
        "ok",
        f"bitsandbytes {quantized}"
        if quantized
        else "bitsandbytes is not installed; only `quantize` needs it",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> Iterator[Finding]:
    cores = cpu_cores()
    bf16 = "native bf16" if cpu_has_bf16() else "no native bf16, so precision auto is fp32"
    yield Finding("hardware", "ok", f"CPU: {cores} cores, {bf16}")
    total, free = memory()
    yield Finding("hardware", "ok", f"memory: {_gb(total)} GB, {_gb(free)} GB of it free")
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads) > cores:
        yield Finding(
            "hardware",
            "note",
            f"OMP_NUM_THREADS={threads} is more than the {cores} "
            "cores, which slows every product down",
            f"export OMP_NUM_THREADS={cores}",
        )
    if not torch.cuda.is_available():
        if torch.version.cuda is not None:
            yield Finding(
                "hardware",
                "note",
                f"PyTorch is built for CUDA {torch.version.cuda}, "
                "but it sees no GPU; training runs on the CPU",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES if there should be one",
            )
        else:
            yield Finding("hardware", "ok", "no GPU: PyTorch is a CPU build")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        native = "native bf16" if properties.major >= 8 else "no native bf16, auto is fp16"
        yield Finding(
            "hardware",
            "ok",
            f"GPU {index}: {properties.name}, {_gb(properties.total_memory)} GB, {native}",
        )


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """Bytes of the machine's memory: all, and what a new process can have."""
    state = psutil.virtual_memory()
    return int(state.total), int(state.available)


def _disk(model: str, recipe: Recipe | None) -> Iterator[Finding]:
    folders = [("run folder", Path("." if recipe is None else recipe.output), _RUN_NEEDS)]
    needed = bytes_still_needed(model)
    if needed is not None:
        folders.insert(0, ("model cache", cache_folder(), needed))
    for name, folder, needed in folders:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK) and needed:
            yield Finding(
                "disk",
                "problem",
                f"{name} {folder}: {there} cannot be written",
                "MANYLORA_CACHE=FOLDER" if name == "model cache" else "output=FOLDER",
            )
        elif free < needed:
            yield Finding(
                "disk",
                "problem",
                f"{name} {folder}: {_gb(free)} GB free, {_gb(needed)} GB needed",
                "free some space, or choose another folder",
            )
        else:
            yield Finding("disk", "ok", f"{name} {folder}: {_gb(free)} GB free")


def _settings(recipe: Recipe) -> Iterator[Finding]:
    run = recipe.run
    if run.is_file():
        yield Finding("recipe", "problem", f"output={run} is a file", "output=ANOTHER_FOLDER")
    elif run.is_dir() and any(run.iterdir()):
        yield Finding(
            "recipe",
            "problem",
            f"the run folder {run} is not empty",
            "output=ANOTHER_FOLDER, or remove it",
        )
    if recipe.quantize is not None and find_spec("bitsandbytes") is None:
        yield Finding(
            "recipe",
            "problem",
            f"quantize={recipe.quantize} needs bitsandbytes",
            "pip install 'manylora[quantized]'",
        )
    try:
        precision = resolve_precision(recipe.train.precision, _device())
        yield Finding("recipe", "ok", f"precision: {precision} on {_device().type}")
    except ValueError as error:
        yield Finding("recipe", "problem", str(error))


def _data(recipe: Recipe) -> Iterator[Finding]:
    try:
        corpus = recipe.load_corpus()
        if needs_discovery(recipe) and not _can_look(recipe):
            yield Finding(
                "data",
                "note",
                "clusters are not looked for: discovery.features=model reads the rows with the "
                "base model, which is not here yet",
            )
            return
        settled = settle(recipe, corpus, Console(quiet=True))
    except (CorpusError, RecipeError, FileNotFoundError) as error:
        yield Finding("data", "problem", str(error))
        return
    recipe, corpus = settled.recipe, settled.corpus
    if settled.found is not None:
        yield Finding("data", "ok", f"{headline(settled.found)} ({settled.found.chosen_by})")
    rows = sum(map(len, corpus.train.values()))
    tasks = len(corpus.tasks)
    yield Finding("data", "ok", f"{recipe.data}: {tasks} task(s), {rows:,} training rows")
    branches = recipe.config(tasks).branches_of()
    if branches.gate == "one_hot" and branches.count != tasks:
        yield Finding(
            "data",
            "problem",
            f"adapter.gate=one_hot trains one branch for each of the "
            f"{tasks} tasks, but the adapter has {branches.count} branches",
            "leave adapter.num_branches out",
        )
    yield from _memory(recipe, corpus)


def _can_look(recipe: Recipe) -> bool:
    """Is what discovery would read here? Nothing is downloaded."""
    if recipe.discovery.features == "tfidf" or recipe.tasks not in ("named", "discovered"):
        return True
    try:
        return local_folder(recipe.model) is not None
    except BaseModelError:
        return False


def _memory(recipe: Recipe, corpus: Corpus) -> Iterator[Finding]:
    try:
        source = local_folder(recipe.model)
    except BaseModelError:
        return  # said of the base model already
    if source is None:
        yield Finding(
            "memory", "note", "not estimated: the base model is not here yet, or not unpacked"
        )
        return
    try:
        longest, answers = longest_rows(corpus, source, recipe.max_length)
        need = estimate(recipe, source, len(corpus.tasks), longest, answers, _device())
    except (BaseModelError, OSError, ValueError) as error:
        yield Finding("memory", "problem", f"not estimated: {error}")
        return
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory()[1]
    fits = need.total <= free
    text = f"about {_gb(need.total)} GB needed to train (an estimate), {_gb(free)} GB free"
    remedy = (
        ""
        if fits
        else "a smaller train.batch_size (with train.gradient_accumulation), "
        "train.gradient_checkpointing=true, dtype=bfloat16 or a smaller max_length"
    )
    yield Finding("memory", "ok" if fits else "problem", text, remedy, _rows(need))


def _rows(need: Estimate) -> tuple[tuple[str, str, str], ...]:
    parts = [(part.name, f"{part.bytes / 1e9:.2f}", part.how) for part in need.parts]
    return (*parts, ("total", f"{need.total / 1e9:.2f}", ""))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
