"""PEFT without `import manylora`: the opt-in autoload, and the import line of the model card."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manylora
from manylora.cli.importing import app
from manylora.importing.autoload import HOOK_FILE, LINE_FILE, disable, enable, status
from manylora.recipe import Recipe
from manylora.train import train
from tiny import attach, tiny_llama

SITE = "import site; site.addsitedir({site!r})\n"
LOAD = """
import sys, torch
from peft import PeftModel
sys.path.insert(0, {tests!r})
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r})
print(float(model(torch.arange(3, 10)[None]).logits.double().sum()))
"""


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A base model, an adapter for it, and the sum of its logits."""
    import torch

    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    model = attach(tiny_llama(), init_weights=False, task_type="CAUSAL_LM").eval()
    model.save_pretrained(folder / "adapter")
    logits = model(torch.arange(3, 10)[None]).logits
    return folder / "base", folder / "adapter", float(logits.detach().double().sum())


def test_an_adapter_loads_without_the_import_when_enabled_and_not_otherwise(
    saved: tuple[Path, Path, float], site: Path
) -> None:
    base, adapter, expected = saved
    tests = str(Path(__file__).parent)
    code = SITE.format(site=str(site)) + LOAD.format(
        tests=tests, base=str(base), adapter=str(adapter)
    )
    before = python(code)
    assert before.returncode == 1
    assert "KeyError: 'MANYLORA'" in before.stderr
    enable(site)
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected, abs=1e-3)
    disable(site)
    assert not list(site.iterdir())


def test_status_says_what_is_so(site: Path) -> None:
    assert "not enabled" in status(site)
    assert "is enabled" in enable(site)
    assert {path.name for path in site.iterdir()} == {LINE_FILE, HOOK_FILE}
    assert "is enabled" in enable(site)  # again: the same two files
    (site / HOOK_FILE).unlink()
    assert "is broken" in status(site)
    assert "not enabled" in disable(site)


def test_the_command_does_the_same(site: Path) -> None:
    run = CliRunner()
    for action, said in (("enable", "is enabled"), ("status", "is enabled"), ("disable", "is not")):
        done = run.invoke(app, ["autoload", action, "--target", str(site)])
        assert done.exit_code == 0, done.output
        assert said in done.output
    assert not list(site.iterdir())


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="no such site directory"):
        enable(tmp_path / "nowhere")


def test_python_starts_without_importing_anything_more(site: Path) -> None:
    code = "import sys; a = set(sys.modules); {}; print(sorted(set(sys.modules) - a))"
    enable(site)
    without = python(code.format("import site"), "-I")
    done = python(code.format(f"import site; site.addsitedir({str(site)!r})"), "-I")
    new = set(eval(done.stdout)) - set(eval(without.stdout))
    assert new == {"_manylora_autoload"}


def test_peft_works_when_manylora_cannot_be_imported(site: Path, tmp_path: Path) -> None:
    """Another manylora in the way, which fails: PEFT goes on, and says so."""
    enable(site)
    (tmp_path / "manylora.py").write_text("raise OSError('no disk')\n", encoding="utf-8")
    code = SITE.format(site=str(site)) + f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import peft; print(peft.LoraConfig)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "did not register with PEFT (OSError: no disk)" in done.stderr
    assert "LoraConfig" in done.stdout


def test_importing_manylora_first_works_too(site: Path) -> None:
    enable(site)
    done = python(SITE.format(site=str(site)) + "import manylora; print(manylora.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == manylora.__version__
    assert "Warning" not in done.stderr


def test_the_cards_code_runs(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from manylora.base import load_model

    recipe = make_recipe()
    run = train(recipe, Console(stderr=True))
    blocks = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 2
    assert all(block.startswith("import manylora") for block in blocks)
    monkeypatch.chdir(run.parent)
    for block in blocks:
        names: dict[str, object] = {"base_model": load_model(recipe.model)}
        exec(block, names)
        assert getattr(names["model"], "peft_config")["default"].method == "hydralora"  # noqa: B009
