"""`python -m manylora`, which torchrun needs: the command."""

from __future__ import annotations

from manylora.cli import main

main()
