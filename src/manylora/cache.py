"""Where things are kept that are made once: converted base models, corpora that have been read."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MANYLORA_CACHE, else $XDG_CACHE_HOME/manylora, else ~/.cache/manylora."""
    if own := os.environ.get("MANYLORA_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "manylora"
    return Path.home() / ".cache" / "manylora"
