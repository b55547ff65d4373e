"""The opt-in autoload: PEFT loads manylora adapters in programs that do not import manylora.

PEFT 0.21 has no entry points, so without `import manylora` loading ends in KeyError: 'MANYLORA'.
Enabled, two small files lie in the environment's site directory: manylora_autoload.pth, one line
that Python runs at every start, and the module that this line imports (`autoload_hook`), which adds
`import manylora` to the import of peft. Python started with -S or -I -S does not read them.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

HOOK = "_manylora_autoload"
LINE_FILE, HOOK_FILE = "manylora_autoload.pth", f"{HOOK}.py"


def enable(target: Path | None = None) -> str:
    """Write the two files into a site directory (this environment's); what was done, in words.

    Raises OSError where the directory cannot be written to.
    """
    folder = _folder(target)
    hook = Path(__file__).with_name("autoload_hook.py").read_text(encoding="utf-8")
    try:
        _write(folder / HOOK_FILE, hook)  # first: the line imports it
        _write(folder / LINE_FILE, f"import {HOOK}\n")
    except OSError as error:
        raise OSError(
            f"{folder}: cannot be written to ({error.strerror}); use a virtual environment, or "
            "write `import manylora` in your program"
        ) from error
    return f"{status(target)}; `manylora autoload disable` takes it away"


def disable(target: Path | None = None) -> str:
    """Take the two files away; what is so now, in words."""
    folder = _folder(target)
    for name in (LINE_FILE, HOOK_FILE):
        (folder / name).unlink(missing_ok=True)
    for compiled in (folder / "__pycache__").glob(f"{HOOK}.*"):
        compiled.unlink()
    return status(target)


def status(target: Path | None = None) -> str:
    """Whether it is enabled, and where, in words."""
    folder = _folder(target)
    there = [name for name in (LINE_FILE, HOOK_FILE) if (folder / name).is_file()]
    if len(there) == 2:
        return f"autoload is enabled: importing peft imports manylora ({folder / LINE_FILE})"
    if there:
        return f"autoload is broken: {folder} holds {there[0]} alone; enable it again, or disable"
    return f"autoload is not enabled in {folder}: programs need `import manylora`"


def _folder(target: Path | None) -> Path:
    folder = Path(sysconfig.get_paths()["purelib"]) if target is None else target
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such site directory")
    return folder


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
