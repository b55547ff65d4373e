"""What adapter_config.json may hold: the type and the bounds of each field, before PEFT reads it.

PEFT reads the file without looking: a rank that is a word, a NaN or a pattern that does not compile
would end deep inside a library. `ManyLoraConfig` itself judges how the values fit together.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_RANK = 2**16
MOST_BYTES = 2**23
"""No adapter_config.json is as large: 8 MiB hold a rank for each of 80,000 layers."""

SECONDS_FOR_PATTERNS = 5.0
_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(rf"(.*\\.)?({pattern})$", name)
        re.fullmatch(pattern, name)
"""

Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
Place = Annotated[int, Field(ge=0, lt=2**31)]
Names = list[str] | str | None
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")


class AdapterFileError(ValueError):
    """A file of an adapter folder that is not what it must be: which, what is wrong, what to do."""


def printable(error: Exception) -> str:
    """An error's message, which may repeat what a file says, without control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))[:1000]


class _Saved(BaseModel):
    """The fields of `ManyLoraConfig` and of PEFT's own, as JSON holds them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: Literal["MANYLORA"]
    task_type: str | None = None
    auto_mapping: dict[str, str | None] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    method: str = "hydralora"
    r: Rank = 8
    num_branches: Place | None = None
    lora_alpha: Alpha = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout_per_branch: bool = False
    target_modules: Names = "all-linear"
    exclude_modules: Names = None
    shared_rank: Annotated[int, Field(ge=0, le=MOST_RANK)] = 0
    branch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    branch_ranks: list[Rank] | None = None
    gate: str | None = None
    num_tasks: Annotated[int, Field(ge=1, le=MOST_RANK)] | None = None
    router_input: str = "x"
    share_A: bool | None = None
    share_B: bool = False
    init_A: str = "kaiming"
    init_weights: bool = True
    balance_loss: str | None = None
    balance_weight: Alpha = 0.01
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Alpha] = {}
    layers_to_transform: list[Place] | Place | None = None
    layers_pattern: Names = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[Place] | dict[str, list[Place]] | None = None
    selector: bool = False
    format_version: int = 1


def read_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json, each of its type and within bounds.

    Raises AdapterFileError, which names the file, the field and what was given.
    """
    found = _json(path)
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: holds no JSON object; copy the file again")
    if found.get("peft_type") != "MANYLORA":
        raise AdapterFileError(
            f"{path}: peft_type is {str(found.get('peft_type'))[:50]!r}, not 'MANYLORA', so this "
            "is no manylora adapter; load it with PEFT, or bring it in with `manylora import`"
        )
    version = found.get("format_version", 1)
    try:
        _Saved.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise AdapterFileError(
            f"{path}: {where}={repr(first['input'])[:80]}: {first['msg']}; put the value right or "
            "copy the file again"
        ) from None
    if version == 1:  # a newer format has its own fields, and its own error
        _refuse_unknown(path, found)
    _refuse_bad_patterns(path, found)
    return found


def _json(path: Path) -> Any:
    if (size := path.stat().st_size) > MOST_BYTES:
        raise AdapterFileError(
            f"{path}: {size:,} bytes are no adapter's configuration (at most {MOST_BYTES:,})"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path}: is not JSON ({str(error)[:200]}); copy the file again"
        ) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _refuse_unknown(path: Path, found: dict[str, Any]) -> None:
    known = set(_Saved.model_fields)
    for name, value in found.items():
        # A newer PEFT saves fields of its own; one that is empty or off asks for nothing.
        if name not in known and name != "runtime_config" and value not in (None, False, [], {}):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise AdapterFileError(
                f"{path}: unknown field {name[:80]!r}; {meant}Take it out, or update manylora and "
                "PEFT if a newer one wrote it"
            )


def _refuse_bad_patterns(path: Path, found: dict[str, Any]) -> None:
    for name, pattern in patterns_of(found):
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterFileError(
                f"{path}: {name}: {pattern[:80]!r} is no regular expression: {str(error)[:100]}"
            ) from None


def patterns_of(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, regular expression) for all that PEFT will match with names of layers."""
    patterns: list[tuple[str, str]] = []
    for name in _PATTERNS:
        value: Any = found.get(name)
        if isinstance(value, str):
            patterns.append((name, value))
        elif name == "layers_pattern":
            patterns += [(name, text) for text in value or []]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += [(name, text) for text in found.get(name) or {}]
    return patterns


def check_patterns(file: Path, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Match a loaded configuration's patterns with the layers, in a process that can be ended.

    A regular expression can be written so that matching a name takes for ever; it takes at least
    two repetitions for that, so most adapters start no process.

    Raises AdapterFileError, which names `file`, when it takes longer than SECONDS_FOR_PATTERNS.
    """
    risky = [text for text in patterns if sum(map(text.count, "*+{")) > 1]
    if not risky:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_ALL],
            input=json.dumps([risky, list(names)]),
            text=True,
            capture_output=True,
            timeout=SECONDS_FOR_PATTERNS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise AdapterFileError(
            f"{file}: matching {str(risky)[:200]} with the model's layers does not end within "
            f"{SECONDS_FOR_PATTERNS:.0f} s; write the names out"
        ) from None
