"""GGUF files as base models: unpacked once to a safetensors folder in the cache.

Every later load reads that folder, which is two orders of magnitude faster than reading the GGUF.
The folder is named by the SHA-256 of the file, so a file moved or copied is not unpacked again, and
another file under the same name is. Its weights are float32, or bfloat16 above `FLOAT32_BELOW`
parameters, where float32 would be many times the size of the file; the rounding (2^-9) is far below
that of a quantised file (2^-4 for 4 bits).
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from manylora.base.converted import (
    BaseModelError,
    complete_folder,
    is_complete,
    known_sha256,
    require_room,
    sha256_of,
)
from manylora.base.gguf_header import Header, read_header
from manylora.cache import cache_folder

FLOAT32_BELOW = 1_500_000_000
_SPARE = 50e6  # tokenizer and config


def gguf_folder(path: Path) -> Path:
    """The folder that the GGUF file is unpacked to; unpacks it the first time."""
    check_gguf(path)
    digest = sha256_of(path)

    def make(_workspace: Path, folder: Path) -> None:
        convert(path, folder)

    return complete_folder(str(path), _name(digest), digest, make)


def unpacked_folder(path: Path) -> Path | None:
    """The folder if the file has been unpacked, found without reading or writing much."""
    digest = known_sha256(path)
    folder = None if digest is None else cache_folder() / _name(digest)
    return folder if folder is not None and is_complete(folder, digest or "") else None


def check_gguf(path: Path) -> Header:
    """Read the header and refuse what cannot become a base model, before any work is done."""
    header = read_header(path)
    parts = header.keys.get("split.count", 0)
    if parts > 1:
        raise BaseModelError(
            f"{path} is one of {parts} parts of a model. Join them:  llama-gguf-split --merge "
            f"{path.name} WHOLE.gguf   and give the whole file."
        )
    if not header.parameters or not header.architecture:
        raise BaseModelError(f"{path} holds no model: no tensors, or no general.architecture.")
    blocks = header.keys.get(f"{header.architecture}.block_count", 0)
    if blocks > header.tensors:
        raise BaseModelError(
            f"{path} is damaged: it says that it has {blocks:,} blocks, and holds "
            f"{header.tensors:,} tensors. Fetch it again."
        )
    if not header.keys.get("tokenizer.ggml.model") or not header.keys.get("tokenizer.ggml.tokens"):
        raise BaseModelError(
            f"{path} holds no tokenizer (tokenizer.ggml.model and tokenizer.ggml.tokens), so text "
            "cannot be read with it. Convert the model again with its tokenizer, or give a folder."
        )
    return header


def stored_dtype(header: Header) -> torch.dtype:
    """What the weights are unpacked to."""
    return torch.float32 if header.parameters < FLOAT32_BELOW else torch.bfloat16


def bytes_needed(header: Header) -> float:
    """Bytes of the unpacked folder."""
    return header.parameters * stored_dtype(header).itemsize + _SPARE


def convert(path: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a transformers folder."""
    header = check_gguf(path)
    dtype, size = stored_dtype(header), bytes_needed(header)
    require_room(folder.parent, size, f"unpacking {path}")
    kind = str(dtype).removeprefix("torch.")
    place = f"{cache_folder()} ({size / 1e9:.1f} GB, {kind})"
    print(f"Unpacking {path.name} once to {place} ...", file=sys.stderr, flush=True)
    # The progress bars of the unpacking ignore every switch, so stderr is set aside.
    with redirect_stderr(io.StringIO()):
        try:
            model, tokenizer = _read(path, dtype)
        except BaseModelError:
            raise
        except Exception as error:  # a damaged file fails anywhere in gguf and transformers
            raise BaseModelError(
                f"{path} cannot be unpacked: {type(error).__name__}: {error}. If llama.cpp reads "
                "this file, convert the original model to a transformers folder and give that."
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_architecture(path: Path) -> None:
    """Refuse an architecture that transformers cannot read from GGUF."""
    try:
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(
            f"{path} is a model that transformers cannot read from GGUF: "
            f"{str(error).rstrip('.')}. Give the original model as a folder or hub name."
        ) from None


def _read(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_architecture(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # dequantize=True: otherwise transformers calls the model quantized and refuses to train or
    # save it.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(
            f"{path} lacks {len(missing)} tensors of the model, such as {missing[0]!r}; with "
            "random ones in their place it would be another model. Fetch or convert it again."
        )
    return model, tokenizer


def _name(digest: str) -> str:
    return f"gguf-{digest[:20]}"
