"""What the doctor says of a base model, without fetching or unpacking it."""

from __future__ import annotations

from pathlib import Path

import pytest

from manylora import base
from manylora.base import default
from manylora.base.state import examine_model
from manylora.doctor import Finding, examine
from manylora.recipe import Recipe, load_recipe
from tiny_gguf import write_gguf


def recipe_of(model: str | Path, data: Path, folder: Path) -> Recipe:
    return load_recipe(None, [f"model={model}", f"data={data}", f"output={folder / 'run'}"])


def of(findings: list[Finding], topic: str, status: str = "problem") -> list[str]:
    return [f.text for f in findings if f.topic == topic and f.status == status]


def test_a_default_model_that_is_not_here_is_noted_with_its_size(
    tmp_path: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "_PACKAGE", "no_such_package_here")
    findings = examine(recipe_of(base.DEFAULT_MODEL, task_folder, tmp_path))
    assert "93 MB" in of(findings, "base model", "note")[0]
    assert "not here yet" in of(findings, "memory", "note")[0]
    assert not list((tmp_path / "cache").glob("smollm*"))


def test_a_folder_without_a_config_is_a_problem(tmp_path: Path, task_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    findings = examine(recipe_of(tmp_path / "empty", task_folder, tmp_path))
    assert "without config.json" in of(findings, "base model")[0]


@pytest.mark.parametrize(("offline", "status"), [(True, "problem"), (False, "note")])
def test_a_hub_model_that_is_not_cached(
    offline: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main = tmp_path / "models--owner--name" / "refs" / "main"
    main.parent.mkdir(parents=True)
    main.write_text("a" * 40)
    found = list(examine_model("owner/name@v2"))
    assert [f.status for f in found] == [status]
    assert f"it has main ({'a' * 40})" in found[0].text


def test_a_gguf_file_is_examined_without_unpacking_it(
    tmp_path: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "model.gguf")
    findings = examine(recipe_of(path, task_folder, tmp_path))
    assert (
        "llama, 0.1 M parameters; the first run unpacks it" in of(findings, "base model", "note")[0]
    )
    assert "0.1 GB" in of(findings, "base model", "note")[0]
    assert any("model cache" in text for text in of(findings, "disk", "ok"))
    assert not list((tmp_path / "cache").glob("gguf*"))
    base.resolve(str(path))
    findings = examine(recipe_of(path, task_folder, tmp_path))
    assert "unpacked" in of(findings, "base model", "ok")[0]
    assert of(findings, "memory", "ok") != []


def test_a_damaged_gguf_file_is_a_problem(tmp_path: Path, task_folder: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture="nosuch")
    assert (
        "nosuch is not supported"
        in of(examine(recipe_of(path, task_folder, tmp_path)), "base model")[0]
    )
    path.write_bytes(path.read_bytes()[:5000])
    assert (
        "truncated or damaged"
        in of(examine(recipe_of(path, task_folder, tmp_path)), "base model")[0]
    )
