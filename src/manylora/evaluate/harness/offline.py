"""lm-eval's own tasks, over files of a folder instead of data sets of the hub.

A task is lm-eval's YAML as installed, with nothing changed but where its rows come from
(TaskConfig's `custom_dataset`) and what `departures` says of the scoring of two, so a prompt is
lm-eval's character for character. Names are lm-eval's too:

    mmlu, mmlu_stem, mmlu_anatomy, ...   the paper's prompt; A to D are ranked ("default" there)
    mmlu_medical, mmlu_law               the subjects of HydraLoRA (arXiv 2404.19245)
    gsm8k_cot                            8 worked examples (arXiv 2201.11903), fixed in the task
    gsm8k                                5 examples drawn from train rows, which must be there
    bbh (also bbh_cot_fewshot)           3 worked examples (arXiv 2210.09261), fixed in the task
    bbh_fewshot                          the same 3 with the answer alone
    humaneval                            the prompt is the function's head; run in our sandbox
    super_glue                           boolq, cb, copa, multirc, sglue_rte, wsc: ranked answers

Below the folder:

    mmlu/{test,dev}/SUBJECT_{test,dev}.csv      bbh/bbh/TASK.json
    gsm8k/test.jsonl, perhaps train.jsonl       humaneval/HumanEval.jsonl.gz
    superglue/{BoolQ,CB,COPA,MultiRC,RTE,WSC}/val.jsonl, perhaps train.jsonl
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError

from manylora.corpus import CorpusError
from manylora.evaluate.harness import require_lm_eval, rows
from manylora.evaluate.harness.programs import humaneval_config


@dataclass(frozen=True)
class Files:
    """Where the rows of a data set lie, split by split; {name} is lm-eval's dataset_name.

    maybe: a split that only few-shot examples come from, and may be missing.
    """

    convert: rows.Convert
    splits: dict[str, str]
    maybe: dict[str, str]

    def load(self, folder: Path, name: str) -> Any:
        from datasets import Dataset, DatasetDict

        splits = {split: path.format(name=name) for split, path in self.splits.items()}
        for split, path in self.maybe.items():
            if (folder / path).is_file():
                splits[split] = path
        found = {
            split: Dataset.from_list(rows.read_rows(folder / path, self.convert))
            for split, path in splits.items()
        }
        return DatasetDict({split: Dataset.from_list([]) for split in self.maybe} | found)


def _super_glue(name: str, convert: rows.Convert) -> Files:
    folder = f"superglue/{name}"
    return Files(convert, {"validation": f"{folder}/val.jsonl"}, {"train": f"{folder}/train.jsonl"})


FOLDERS = ("mmlu/default", "gsm8k", "bbh", "humaneval", "super_glue")
"""Those of lm-eval's tasks that are looked through; all of them takes it a minute."""

FILES = {
    ("cais/mmlu", None): Files(
        rows.mmlu,
        {"test": "mmlu/test/{name}_test.csv", "dev": "mmlu/dev/{name}_dev.csv"},
        {},
    ),
    ("openai/gsm8k", "main"): Files(
        rows.gsm8k, {"test": "gsm8k/test.jsonl"}, {"train": "gsm8k/train.jsonl"}
    ),
    ("SaylorTwift/bbh", None): Files(rows.bbh, {"test": "bbh/bbh/{name}.json"}, {}),
    ("openai/openai_humaneval", None): Files(
        rows.humaneval, {"test": "humaneval/HumanEval.jsonl.gz"}, {}
    ),
    ("aps/super_glue", "boolq"): _super_glue("BoolQ", rows.boolq),
    ("aps/super_glue", "cb"): _super_glue("CB", rows.cb),
    ("aps/super_glue", "copa"): _super_glue("COPA", rows.copa),
    ("aps/super_glue", "multirc"): _super_glue("MultiRC", rows.multirc),
    ("aps/super_glue", "rte"): _super_glue("RTE", rows.rte),
    ("aps/super_glue", "wsc.fixed"): _super_glue("WSC", rows.wsc),
}
"""By lm-eval's dataset_path and dataset_name; None: every name of that path."""

FROM_FILES = "mmlu, mmlu_medical, mmlu_law, gsm8k_cot, bbh, bbh_fewshot, humaneval, super_glue"

GROUPS = {
    "mmlu_medical": [
        "mmlu_clinical_knowledge",
        "mmlu_professional_medicine",
        "mmlu_college_medicine",
    ],
    "mmlu_law": ["mmlu_professional_law", "mmlu_international_law"],
    "super_glue": ["boolq", "cb", "copa", "multirc", "sglue_rte", "wsc"],
}

MULTIRC: dict[str, Any] = {
    "doc_to_choice": "['''{{answer}}\\nIs the answer correct? no''', "
    "'''{{answer}}\\nIs the answer correct? yes''']"
}
"""The data's label 1 is a right answer; lm-eval 0.4.13 has "yes" at place 0, so its accuracy counts
the wrong ones. The same two texts are compared."""

BBH_FEWSHOT: dict[str, Any] = {
    "filter_list": [
        {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ]
}
"""lm-eval 0.4.13 compares what is written after "A:" with the bare answer, so the space that most
tokenizers put between them makes every answer wrong. It is taken away."""

OFFICIAL = {
    "mmlu": 14042, "mmlu_medical": 710, "mmlu_law": 1655, "gsm8k_cot": 1319, "gsm8k": 1319,
    "bbh": 6511, "bbh_cot_fewshot": 6511, "bbh_fewshot": 6511, "humaneval": 164, "boolq": 3270,
    "cb": 56, "copa": 100, "multirc": 4848, "sglue_rte": 277, "wsc": 104,
}  # fmt: skip
"""Documents of the whole benchmark: a result over fewer is not the benchmark's."""


def departures(name: str) -> dict[str, Any]:
    """What is not as lm-eval has it in the task of this name."""
    if name == "multirc":
        return MULTIRC
    return BBH_FEWSHOT if name.startswith("bbh_fewshot_") else {}


@dataclass(frozen=True)
class Benchmarks:
    """Built tasks by name, and for each group that was asked for the names of its tasks."""

    tasks: dict[str, Any]
    groups: dict[str, list[str]]


def load_tasks(
    names: Sequence[str], data_dir: Path | None, samples: int = 1, *, allow_code: bool
) -> Benchmarks:
    """lm-eval's tasks of these names; with data_dir over its files, else over the hub's data sets.

    samples: programs to write for each problem of humaneval. allow_code: they may be run.

    Raises CorpusError for a file that is missing or in another form, ValueError for an unknown
    name.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_defaults=False, include_path=[_tasks_folder() / folder for folder in FOLDERS]
    )
    if data_dir is None and any(not _known(name, manager) for name in names):
        manager = TaskManager()
    groups, wanted = {}, {}
    for name in names:
        if not _known(name, manager):
            raise ValueError(_unknown(name, manager, data_dir))
        members = _expand(name, manager)
        wanted.update(dict.fromkeys(members))
        if members != [name]:
            groups[name] = members
    written = humaneval_config(samples, allow_code, manager)
    return Benchmarks({name: _build(name, manager, data_dir, written) for name in wanted}, groups)


def _tasks_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__path__[0])


def _known(name: str, manager: Any) -> bool:
    return name in GROUPS or name in manager.task_index


def _unknown(name: str, manager: Any, data_dir: Path | None) -> str:
    known = [*GROUPS, *manager.all_tasks]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    if data_dir is None:
        return f"lm-eval has no task {name!r}.{hint}"
    return (
        f"no benchmark {name!r} among those that can be read from files: {FROM_FILES} and their "
        f"parts.{hint} Without a folder of files, every task of lm-eval is there, over data sets "
        "of the hub."
    )


def _expand(name: str, manager: Any) -> list[str]:
    """The single tasks of a task, tag or group, as lm-eval or `GROUPS` puts them together."""
    if name in GROUPS:
        return GROUPS[name]
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return sorted(entry.tags)
    if name not in manager.all_groups:
        return [name]
    found: dict[str, None] = {}
    for member in entry.cfg["task"]:
        if not isinstance(member, str):
            raise ValueError(
                f"the group {name} of lm-eval changes its tasks as it puts them together, which "
                "is not supported here; ask for its tasks by their own names"
            )
        found.update(dict.fromkeys(_expand(member, manager)))
    return list(found)


def _build(name: str, manager: Any, data_dir: Path | None, humaneval: dict[str, Any]) -> Any:
    changes = dict(departures(name))
    config = manager.task_index[name].cfg
    if data_dir is not None:
        changes["custom_dataset"] = _local(name, config, data_dir)
    if name == "humaneval":  # as it is, building it fetches a metric from the hub
        spec: dict[str, Any] = {**config, **humaneval, **changes}
    else:
        spec = {"group": "manylora", "task": [{"task": name, **changes}]}
    try:
        task = manager.load([spec])["tasks"][name]
    except (OSError, DatasetsError) as error:
        raise _unreachable(name, config, error) from error
    if task.get_config("unsafe_code") and name != "humaneval":
        raise ValueError(
            f"{name} runs programs that the model writes, and lm-eval would run them with nothing "
            "to hold them; of such tasks only humaneval is run here, in a sandbox"
        )
    return task


def _unreachable(name: str, config: dict[str, Any], error: Exception) -> CorpusError:
    reason = " ".join(str(error).split())[:200]
    where = config.get("dataset_path") or "which it reads"
    return CorpusError(
        f"{name}: without --data-dir its rows come from the hub, and the data set {where} cannot "
        f"be had there ({type(error).__name__}: {reason}); check the network and HF_HUB_OFFLINE, "
        f"or give --data-dir (data_dir=) a folder with files of {FROM_FILES}"
    )


def _local(name: str, config: dict[str, Any], data_dir: Path) -> Any:
    path, dataset = str(config["dataset_path"]), config.get("dataset_name")
    files = FILES.get((path, dataset)) or FILES.get((path, None))
    if files is None:
        raise CorpusError(f"{name}: no files of {path} ({dataset}) are known to be read from.")
    found = files.load(data_dir, str(dataset))
    return lambda **_: found


def check_shots(name: str, task: Any, shots: int) -> None:
    """Raises ValueError when a task has fewer examples to show than asked for."""
    if shots < 0:
        raise ValueError(f"shots={shots}: give 0 or more")
    there = len(list(task.fewshot_docs())) if shots else 0
    if shots > there:
        raise ValueError(
            f"{name}: {shots} examples to show were asked for, and there are {there}; give fewer "
            "shots, or, where the benchmark takes them from train rows, put those beside its file "
            "as train.jsonl"
        )
