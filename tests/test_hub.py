"""Hub names with a revision, without a hub: a cache as huggingface_hub lays it out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import PreTrainedModel

import manylora
from manylora.base import (
    BaseModelError,
    cached,
    load_model,
    load_tokenizer,
    name_and_revision,
    pinned,
    resolve,
)
from tiny import save_tiny_model

OLD, NEW = "a" * 40, "b" * 40
TOKENS = torch.tensor([[5, 9, 3, 7]])


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """owner/name was fetched at v1 (OLD), then again when main had moved on to NEW."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / "models--owner--name"
    for seed, commit in enumerate((OLD, NEW)):
        save_tiny_model(folder / "snapshots" / commit, seed=seed)
    for ref, commit in {"v1": OLD, "main": NEW, "refs/pr/1": OLD}.items():
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return cache


@pytest.fixture
def offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process sees that cache and nothing else."""
    for place in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{place}.HF_HUB_CACHE", str(hub_cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub_cache


def snapshot(cache: Path, commit: str) -> Path:
    return cache / "models--owner--name" / "snapshots" / commit


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    return torch.equal(model(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.parametrize(
    ("revision", "commit"),
    [("", NEW), ("@main", NEW), ("@v1", OLD), ("@refs/pr/1", OLD), (f"@{OLD}", OLD)],
)
def test_revision_is_pinned_to_its_commit_and_loaded_at_it(
    offline: Path, revision: str, commit: str
) -> None:
    model = f"owner/name{revision}"
    assert pinned(model) == f"owner/name@{commit}"
    assert same(load_model(model), load_model(str(snapshot(offline, commit))))
    assert cached(model)
    assert load_tokenizer(model).eos_token == "<|end|>"


def test_pinned_model_stays_when_main_moves_on(offline: Path) -> None:
    main = offline / "models--owner--name" / "refs" / "main"
    main.write_text(OLD)
    try:
        model = pinned("owner/name")
        before = load_model(model)
        main.write_text(NEW)
        assert same(load_model(model), before)
        assert not same(load_model("owner/name"), before)
        assert pinned(model) == model
    finally:
        main.write_text(NEW)


def test_pinned_model_is_loaded_in_a_process_of_its_own(hub_cache: Path) -> None:
    """As a user runs it: HF_HUB_CACHE and HF_HUB_OFFLINE from the environment, no patches."""
    script = (
        "from manylora.base import cached, load_model, pinned; model = pinned('owner/name@v1');"
        "print(model, cached(model), float(load_model(model).lm_head.weight.sum()))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    name, here, total = done.stdout.split()
    assert (name, here) == (f"owner/name@{OLD}", "True")
    expected = load_model(str(snapshot(hub_cache, OLD))).lm_head.weight.sum()
    assert float(total) == pytest.approx(float(expected.detach()), abs=1e-6)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", ["no-such-branch", "c" * 40])
def test_unknown_revision_names_those_that_are_here(revision: str) -> None:
    model = f"owner/name@{revision}"
    assert not cached(model)
    for load in (load_model, load_tokenizer, resolve):
        with pytest.raises(BaseModelError) as caught:
            load(model)
        message = str(caught.value)
        for part in (model, f"v1 ({OLD})", f"main ({NEW})", "HF_HUB_OFFLINE is set"):
            assert part in message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("model", "known"),
    [("owner/name@nope", f"main ({NEW})"), ("owner/none", "has nothing of owner/none")],
)
def test_what_cannot_be_pinned_says_what_the_cache_has(model: str, known: str) -> None:
    with pytest.raises(BaseModelError, match="cannot find out the commit") as caught:
        pinned(model)
    assert model in str(caught.value) and known in str(caught.value)


def test_folder_is_pinned_by_its_path_and_wins_over_a_hub_name(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(snapshot(hub_cache, OLD), tmp_path / "owner" / "name@v1")
    monkeypatch.chdir(tmp_path)
    assert pinned("owner/name@v1") == str(tmp_path / "owner" / "name@v1")
    assert name_and_revision("owner/name@v1") == ("owner/name@v1", None)
    assert pinned(manylora.base.DEFAULT_MODEL) == manylora.base.DEFAULT_MODEL


@pytest.mark.parametrize("model", ["owner/name@", "@v1", "owner/name@v1@v2", "owner/name@-x"])
def test_malformed_revision_is_refused(model: str) -> None:
    with pytest.raises(BaseModelError, match="owner/name@revision"):
        resolve(model)


def test_saved_adapter_names_the_model_and_the_commit_for_others(
    offline: Path, tmp_path: Path
) -> None:
    model = pinned("owner/name@v1")
    name, revision = name_and_revision(model)
    config = manylora.ManyLoraConfig(task_type="CAUSAL_LM", init_weights=False)
    trained = get_peft_model(load_model(model), config, revision=revision).eval()
    trained.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/name", OLD)
    assert (name, revision) == ("owner/name", OLD)
    again = PeftModel.from_pretrained(load_model(model), tmp_path)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path)  # finds the base by itself
    assert same(again, trained) and same(alone, trained)
    assert resolve(model) == str(snapshot(offline, OLD))
