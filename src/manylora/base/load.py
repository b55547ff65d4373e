"""`model` in a recipe -> a tokenizer and a frozen causal language model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from manylora.base import hub
from manylora.base.converted import BaseModelError
from manylora.base.default import DEFAULT_MODEL, default_folder, default_is_here
from manylora.base.gguf import gguf_folder
from manylora.base.gguf_header import is_gguf

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["4bit", "8bit"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD_ERRORS = (OSError, ValueError, ImportError, SafetensorError)


class Local(NamedTuple):
    """The model is on this machine, as the default, a folder or a GGUF file."""

    kind: Literal["default", "folder", "gguf"]
    path: Path


def locate(model: str) -> Local | hub.HubModel:
    """What kind of model that is; fetches and unpacks nothing. BaseModelError when it is none."""
    if model == DEFAULT_MODEL:
        return Local("default", Path(model))
    path = Path(model).expanduser()
    if model and path.is_dir():
        _require_config(path)
        return Local("folder", path.resolve())
    if path.is_file():
        if is_gguf(path):
            return Local("gguf", path.resolve())
        raise BaseModelError(
            f"model={model!r} is a file, and no GGUF file; wanted is the folder that holds "
            f"config.json and the safetensors weights, a GGUF file, a hub name, or "
            f"{DEFAULT_MODEL!r}."
        )
    found = None if model.lower().endswith(".gguf") else hub.parse(model)
    if found is None:
        raise BaseModelError(
            f"model={model!r} is neither a folder or GGUF file that exists (looked at "
            f"{path.absolute()}) nor a hub name like 'owner/name' or 'owner/name@revision'. Give "
            f"one of these, or {DEFAULT_MODEL!r}."
        )
    return found


def resolve(model: str) -> str:
    """What transformers can load for `model`: a folder or a hub name.

    Fetches the default and unpacks a GGUF file, once. A hub name with a revision is the folder of
    that revision in the hub cache, which `load_model` fills.
    """
    place = locate(model)
    if isinstance(place, Local):
        return str(_folder(place))
    if place.revision is None:
        return place.name
    snapshot = hub.cached_snapshot(place)
    if snapshot is None:
        raise BaseModelError(
            f"model={model!r} is not in the hub cache yet.\n{hub.advice(place)}, or load it first."
        )
    return str(snapshot)


def pinned(model: str) -> str:
    """`model` in words that mean the same tomorrow and from any working directory.

    A hub name gets the commit it is at now (asks the hub, else its cache); a folder or GGUF file
    becomes an absolute path; the default stays, since its checksum is fixed.
    """
    place = locate(model)
    if isinstance(place, Local):
        return model if place.kind == "default" else str(place.path)
    return f"{place.name}@{hub.commit_of(place)}"


def name_and_revision(model: str) -> tuple[str, str | None]:
    """The hub name and its revision; for a local model itself and None. What PEFT saves."""
    place = locate(model)
    return (model, None) if isinstance(place, Local) else (place.name, place.revision)


def cached(model: str) -> bool:
    """Whether `model` can be loaded with no network at all."""
    try:
        place = locate(model)
    except BaseModelError:
        return False
    if isinstance(place, Local):
        return place.kind != "default" or default_is_here()
    return hub.cached_snapshot(place) is not None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`; where it has no pad token, the end-of-sequence token pads."""
    source, options = _source(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
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
    """The causal language model of `model`, in eval mode; 4bit is NF4 with bfloat16 compute.

    Turns cuDNN's attention off for the process: with a mask its gradients can be NaN on an H100
    (torch 2.11 to 2.13, pytorch issue 196678). torch's other kernels take its place.
    """
    if dtype not in _DTYPES:
        raise BaseModelError(f"dtype={dtype!r} is not known; choose one of {', '.join(_DTYPES)}.")
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize)
    source, revision = _source(model)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, **options, **revision
        )
    except _LOAD_ERRORS as error:
        raise _cannot_load("weights", model, source, error) from None
    return loaded


def _source(model: str) -> tuple[str, dict[str, str]]:
    """from_pretrained's name, and its revision where one is wanted."""
    place = locate(model)
    if isinstance(place, Local):
        return str(_folder(place)), {}
    return place.name, {} if place.revision is None else {"revision": place.revision}


def _folder(place: Local) -> Path:
    if place.kind == "default":
        return default_folder()
    return gguf_folder(place.path) if place.kind == "gguf" else place.path


def _require_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    names = sorted(file.name for file in folder.iterdir())
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    hint = f"It holds: {', '.join(names[:8]) or 'nothing'}."
    if "adapter_config.json" in names:
        hint = (
            "It holds adapter_config.json: this is an adapter, give the base model it was "
            "trained on."
        )
    elif ggufs:
        hint = f"It holds a GGUF file; give the file itself: {folder / ggufs[0]}"
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
    place = locate(model)
    advice = hub.advice(place) if isinstance(place, hub.HubModel) else ""
    return BaseModelError(
        f"{message}\nThere is no folder {model!r} here either. {advice}, or give a local folder "
        f"with config.json, weights and tokenizer, or the default model={DEFAULT_MODEL!r}, which "
        "needs no hub."
    )
