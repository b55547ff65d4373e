"""The papers' benchmarks and every other lm-eval task, on a live adapter.

rows      files of a benchmark -> the columns of its data set on the hub
offline   lm-eval's own task definitions, over those rows
programs  HumanEval, run in manylora's sandbox
model     the adapter as an lm-eval model
scoring   values of examples -> means with intervals
run       all of it, perhaps beside the base model
kept      what a run folder keeps of it
table     its lines, for the terminal and the run's page

lm-eval is an optional dependency. Nothing here imports it before it is needed, except `model`,
which is a subclass of its model class; import that inside functions, after `require_lm_eval`.
"""

from __future__ import annotations

from importlib.util import find_spec


def require_lm_eval() -> None:
    """Raises RuntimeError, saying how to install lm-eval, when it is not there."""
    if find_spec("lm_eval") is None:
        raise RuntimeError(
            "benchmarks are run by lm-eval, which is not installed; install it with "
            "`pip install 'manylora[eval]'`"
        )
