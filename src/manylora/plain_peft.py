"""What an export computes without manylora: logits from a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

# Runs in a process of its own, which must never import manylora.
_PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base, data, *folders = sys.argv[1:]
tokens = load_file(data)["tokens"]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
logits = {}
if not folders:
    with torch.inference_mode():
        logits["0"] = model(input_ids=tokens).logits.contiguous()
for i, folder in enumerate(folders):
    if i == 0:
        model = PeftModel.from_pretrained(model, folder, adapter_name="0").eval()
    else:
        model.load_adapter(folder, adapter_name=str(i))
    model.set_adapter(str(i))
    with torch.inference_mode():
        logits[str(i)] = model(input_ids=tokens).logits.contiguous()
assert not any(name.split(".")[0] == "manylora" for name in sys.modules)
save_file(logits, data)
"""


class PlainPeftError(RuntimeError):
    """PEFT by itself could not load a folder, or manylora was imported on the way."""


def plain_logits(base: str, folders: Sequence[Path], tokens: Tensor) -> list[Tensor]:
    """Float32 logits (batch, tokens, vocabulary) of the base model with each folder's adapter.

    tokens: (batch, tokens) ids. Raises PlainPeftError with the end of the process's own message.
    """
    logits = _elsewhere(base, folders, tokens)
    return [logits[str(i)] for i in range(len(folders))]


def model_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Float32 logits of a model folder by itself; arguments and errors as for `plain_logits`."""
    return _elsewhere(str(folder), [], tokens)["0"]


def _elsewhere(base: str, folders: Sequence[Path], tokens: Tensor) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "logits.safetensors"
        save_file({"tokens": tokens}, str(data))
        command = [sys.executable, "-c", _PLAIN_PEFT, base, str(data), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PlainPeftError(done.stderr[-2000:])
        return load_file(str(data))
