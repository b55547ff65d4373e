"""Continuous batching: what a request gets is what it would get alone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import manylora
from manylora.serve.engine import Engine, Job, Piece
from manylora.serve.limits import ApiError, Limits
from manylora.serve.metrics import Metrics
from manylora.serve.runs import ServedRuns, load_runs
from manylora.serve.sampling import Sampling
from serving import QUESTIONS, make_run, make_runs


@pytest.fixture(scope="module")
def run_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_folder)


@pytest.fixture(scope="module")
def runs(run_folders: list[Path]) -> ServedRuns:
    return load_runs(run_folders)


@pytest.fixture
def engine(runs: ServedRuns) -> Iterator[Engine]:
    engine = Engine(runs, Limits(rows=8, queue=2), Metrics())
    engine.start()
    yield engine
    engine.drain()
    engine.join(60)


class Asked:
    """A job that collects its own pieces."""

    def __init__(self, runs: ServedRuns, model: str, text: str, **options: Any) -> None:
        self.pieces: list[Piece] = []
        self.begun, self.ended = threading.Event(), threading.Event()
        choice = runs.models[model]
        prompt = runs.chat_ids([{"role": "user", "content": text}])
        self.job = Job(choice.row(prompt), prompt, send=self._take, **options)

    def _take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if len(self.pieces) >= 3:
            self.begun.set()
        if piece.finish is not None:
            self.begun.set()
            self.ended.set()

    def wait(self) -> list[Piece]:
        assert self.ended.wait(60)
        return self.pieces

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.wait())


def alone(folder: Path | None, runs: ServedRuns, job: Job) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities from `generate`, in a model of its own."""
    if folder is None:
        model, context = runs.model.get_base_model(), runs.model.disable_adapter()
    else:
        model, _ = manylora.load(folder)
        needed = model.peft_config["default"].branches_of().needs_ids
        context = manylora.branch_ids(model, job.row.branch) if needed else nullcontext()
    ids = torch.tensor([job.prompt])
    with torch.no_grad(), context:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job.max_tokens,
            pad_token_id=runs.pad,
            eos_token_id=sorted(runs.ends),
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[0, len(job.prompt) :].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token])
        for logits, token in zip(out.logits, tokens, strict=True)
    ]
    end = next((i for i, token in enumerate(tokens) if token in runs.ends), len(tokens))
    return tokens[:end], logprobs[:end]


REQUESTS = [
    ("hydra", "hi"),
    ("three", QUESTIONS["parity"]),
    ("pair:copy", "a rather long question, for which all the others have to be padded"),
    ("base", "which colour"),
    ("three:parity", QUESTIONS["copy"]),
    ("pair", QUESTIONS["colour"]),
    ("hydra", "1 2 3"),
]


def named(runs: ServedRuns, model: str) -> str:
    return next(reversed(runs.models)) if model == "base" else model


@pytest.mark.parametrize("prompt_tokens", [8192, 1], ids=["read together", "read one by one"])
def test_runs_and_branches_in_one_batch_answer_as_alone(
    engine: Engine,
    runs: ServedRuns,
    run_folders: list[Path],
    prompt_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some join after the others have begun; each has an end of its own."""
    monkeypatch.setattr("manylora.serve.engine._PROMPT_TOKENS", prompt_tokens)
    asked = [
        Asked(runs, named(runs, model), text, max_tokens=1 if i == 1 else 10 + 3 * i, logprobs=0)
        for i, (model, text) in enumerate(REQUESTS)
    ]
    for one in asked[:3]:
        engine.submit(one.job)
    assert asked[2].begun.wait(60)
    for one in asked[3:]:
        engine.submit(one.job)
    folders = {folder.name: folder for folder in run_folders}
    answers = []
    for one in asked:
        one.wait()
    engine.drain()  # the model is used below, and one thread at a time may
    engine.join(60)
    for (model, _), one in zip(REQUESTS, asked, strict=True):
        reports = [p.likelihood for p in one.pieces if p.likelihood is not None]
        tokens, logprobs = alone(folders.get(model.partition(":")[0]), runs, one.job)
        assert [report.token for report in reports] == tokens, model
        assert [report.logprob for report in reports] == pytest.approx(logprobs, abs=1e-4)
        assert one.text == runs.tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(tuple(tokens))
    assert len(set(answers)) == len(answers)


def test_the_selector_decides_unless_the_task_is_named(runs: ServedRuns) -> None:
    prompt = runs.chat_ids([{"role": "user", "content": QUESTIONS["parity"]}])
    assert runs.models["three"].row(prompt).branch == 2
    assert runs.models["three:copy"].row(prompt).branch == 1
    assert runs.models["hydra"].row(prompt).branch == -1


def test_a_seed_gives_the_same_answer_whoever_is_in_the_batch(
    engine: Engine, runs: ServedRuns
) -> None:
    def ask(seed: int) -> Asked:
        sampling = Sampling(1.5, 0.95, Random(seed))
        return Asked(runs, "hydra", "hello", max_tokens=20, sampling=sampling)

    first = ask(7)
    engine.submit(first.job)
    first.wait()
    mates = [ask(seed) for seed in (1, 7, 2)]
    for mate in mates:
        engine.submit(mate.job)
    texts = [mate.text for mate in mates]
    assert texts[1] == first.text
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_answer_before_it(engine: Engine, runs: ServedRuns) -> None:
    whole = Asked(runs, "hydra", "hello", max_tokens=30)
    engine.submit(whole.job)
    stop = whole.text[5:8]
    cut = Asked(runs, "hydra", "hello", max_tokens=30, stop=[stop])
    engine.submit(cut.job)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.pieces[-1].finish == "stop"
    assert whole.pieces[-1].finish == "length"


def test_a_cancelled_job_frees_its_row(runs: ServedRuns) -> None:
    engine = Engine(runs, Limits(rows=1, queue=4), Metrics())
    engine.start()
    long = Asked(runs, "hydra", "hello", max_tokens=400, ignore_ends=True)
    try:
        engine.submit(long.job)
        assert long.begun.wait(60)
        short = Asked(runs, "hydra", "hello", max_tokens=2)
        unwanted = Asked(runs, "hydra", "hello", max_tokens=2)
        engine.submit(unwanted.job)
        engine.submit(short.job)
        engine.cancel(unwanted.job)
        assert unwanted.wait()[-1].finish == "cancelled"
        assert not long.ended.is_set()
        engine.cancel(long.job)
        assert short.wait()[-1].finish == "length"
        assert long.wait()[-1].finish == "cancelled"
        assert long.pieces[-1].tokens < 400
    finally:
        engine.drain()
        engine.join(60)
    assert engine.running == engine.waiting == 0


def test_a_full_queue_refuses_and_a_drained_engine_finishes(runs: ServedRuns) -> None:
    engine = Engine(runs, Limits(rows=1, queue=1), Metrics())
    done = threading.Event()
    engine.on_drained = done.set
    asked = [Asked(runs, "hydra", "hello", max_tokens=5) for _ in range(3)]
    engine.submit(asked[0].job)
    engine.submit(asked[1].job)
    with pytest.raises(ApiError, match="wait already") as full:
        engine.submit(asked[2].job)
    assert full.value.status == 429 and full.value.headers["retry-after"]
    engine.drain()
    with pytest.raises(ApiError) as draining:
        engine.submit(asked[2].job)
    assert draining.value.status == 503
    engine.start()
    assert [one.wait()[-1].finish for one in asked[:2]] == ["length", "length"]
    assert done.wait(60)


def test_a_failure_of_the_model_ends_its_answers_and_not_the_engine(
    engine: Engine, runs: ServedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(runs.model, "forward", fail)
        lost = Asked(runs, "hydra", "hello", max_tokens=5)
        engine.submit(lost.job)
        assert lost.wait()[-1].finish == "error"
        assert "RuntimeError" in lost.pieces[-1].error
    found = Asked(runs, "hydra", "hello", max_tokens=5)
    engine.submit(found.job)
    assert found.wait()[-1].finish == "length"


def test_answers_that_are_not_numbers_are_errors(
    engine: Engine, runs: ServedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = runs.model.forward

    def nan(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[0] = float("nan")
        return output

    monkeypatch.setattr(runs.model, "forward", nan)
    asked = Asked(runs, "hydra", "hello", max_tokens=5, sampling=Sampling(1.0), logprobs=2)
    engine.submit(asked.job)
    assert asked.wait()[-1].finish == "error"


def test_runs_on_different_bases_are_refused(
    run_folders: list[Path], tmp_path: Path, tiny_folder: Path
) -> None:
    other = tmp_path / "other-base"
    shutil.copytree(tiny_folder, other)
    run = make_run(tmp_path, other, 5, "hydra")
    with pytest.raises(ValueError, match="different ones"):
        load_runs([run_folders[0], run])


def test_two_runs_of_one_name_are_refused(
    run_folders: list[Path], tmp_path: Path, tiny_folder: Path
) -> None:
    run = make_run(tmp_path, tiny_folder, 5, "hydra")
    with pytest.raises(ValueError, match="would be called 'hydra'"):
        load_runs([*run_folders, run])
