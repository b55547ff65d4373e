"""A byte-level BPE tokenizer as GGUF metadata, splitting text as the run's tokenizer does.

llama.cpp knows a tokenizer's splitting (`tokenizer.ggml.pre`) by name; the names here are told by
the pre-tokenizer of tokenizer.json. Others are refused: a wrong one answers worse without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manylora.export.record import ExportError

_LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
_QWEN2 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
_TEXTS = (
    "The court, in 1987, didn't agree: 12,345.67 dollars (or 3 %)!",
    "def f(x):\n\treturn x ** 2  # two  spaces\n\n\n",
    "Größe, naïve, 東京, Привет, 🙂 and a\u00a0hard space",
    "",
)


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Add the tokenizer saved in a folder. vocabulary: rows of the embedding.

    Raises ExportError for a tokenizer that is not byte-level BPE, or splits in an unknown way.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError("the tokenizer has no tokenizer.json, so it cannot be written as GGUF")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not saved["model"].get("merges"):
        raise ExportError(_unknown("one without merges"))
    name = splitting(saved)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens = {index: token for token, index in saved["model"]["vocab"].items()}
    added = {token["id"]: token for token in saved["added_tokens"]}
    tokens |= {index: token["content"] for index, token in added.items()}
    names, kinds = [], []
    for i in range(vocabulary):  # a token beyond has no embedding, so no text of the run has it
        names.append(tokens.get(i, f"[PAD{i}]"))
        kinds.append(_kind(i, tokens, added))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=len(names))
    template = folder / "chat_template.jinja"
    if template.is_file():  # which gguf 0.17 does not look for
        special.chat_template = template.read_text(encoding="utf-8")
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, gguf: Path) -> str:
    """Compare token ids with those of the tokenizer read back from a GGUF file; what came of it.

    folder: where the tokenizer is saved. Raises ExportError when ids differ. Transformers reads
    every byte-level GGUF with GPT-2's splitting, so only where that is the run's can it be tried.
    """
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    name = splitting(saved)
    if name != "gpt-2":
        return f"the tokenizer's splitting, {name}, was not tried"
    back = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [*_TEXTS, *(f"a{token['content']}b" for token in saved["added_tokens"])]
    for text in texts:
        ours, theirs = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, back))
        if ours != theirs:
            raise ExportError(
                f"the tokenizer read back from GGUF gives {text!r} the ids {theirs}, the run's "
                f"{ours}; nothing was kept. Export with --to merged and convert that folder with "
                "llama.cpp's convert_hf_to_gguf.py"
            )
    return f"its tokenizer read back gave the same ids for {len(texts)} texts"


def splitting(saved: dict[str, Any]) -> str:
    """The name that llama.cpp has for the way a tokenizer.json splits text."""
    kind, fallback = saved["model"]["type"], saved["model"].get("byte_fallback")
    if kind != "BPE" or fallback:
        raise ExportError(_unknown(f"a {kind} tokenizer{' with byte fallback' * bool(fallback)}"))
    pre = saved["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    level = steps[-1]
    if kinds[-1] != "ByteLevel" or level.get("add_prefix_space") or saved["normalizer"]:
        raise ExportError(_unknown(f"pre-tokenizer {kinds}"))
    if kinds == ["ByteLevel"] and level.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Split", "ByteLevel"] and pattern.startswith(_LLAMA3):
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and pattern.startswith(_QWEN2):
        return "qwen2"
    raise ExportError(_unknown(f"pre-tokenizer {kinds}"))


def _unknown(what: str) -> str:
    return (
        f"the base model's tokenizer ({what}) is not one that can be written as GGUF here; export "
        "with --to merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    )


def _kind(index: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> TokenType:
    if index not in tokens:
        return TokenType.UNUSED
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL
