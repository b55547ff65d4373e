"""Run PEFT's own tests on manylora (`make conformance`); see manylora_conformance.py.

    python tests/conformance/run.py [pytest arguments]

Downloads the source distribution of the installed PEFT through pip into `.conformance/` (once a
version), makes the tiny language models that PEFT's tests would fetch from a hub, and runs the
tests offline. The exit code is pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SUITES = [
    "tests/test_custom_models.py",
    "tests/test_decoder_models.py",
    "tests/test_encoder_decoder_models.py",
    "tests/test_seq_classifier.py",
]


def unpacked_peft() -> Path:
    """The folder of the installed PEFT's source distribution, downloaded when it is not there."""
    name = f"peft-{version('peft')}"
    folder = REPOSITORY / ".conformance"
    source = folder / name
    complete = source / "tests" / "__init__.py"
    if complete.exists():
        return source
    # --no-binary peft, not :all:, which would build PEFT's build tools from source as well.
    command = ["download", "--quiet", "--no-deps", "--no-binary", "peft", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *command, name.replace("-", "==")], check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    # Left out of the source distribution, though the tests import each other relatively.
    complete.touch()
    return source


def models() -> dict[str, PreTrainedModel]:
    """One tiny model of each kind, with weights large enough to see an adapter's effect."""
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    width = {"hidden_size": 16, "intermediate_size": 32}
    llama = {"num_key_value_heads": 2, "initializer_range": 0.2, **tokens, **heads, **width}
    opt = {"word_embed_proj_dim": 16, "ffn_dim": 32, "init_std": 0.2, **tokens, **heads}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **tokens}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, **tokens}
    bert = {"initializer_range": 0.2, **tokens, **heads, **width}
    made = [
        LlamaForCausalLM(LlamaConfig(**llama)),
        Qwen2ForCausalLM(Qwen2Config(**llama)),
        OPTForCausalLM(OPTConfig(hidden_size=16, **opt)),
        GPT2LMHeadModel(GPT2Config(**gpt2)),
        T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **t5)),
        BertForSequenceClassification(BertConfig(**bert)),
    ]
    return {type(model).__name__: model for model in made}


def main() -> int:
    source = unpacked_peft()
    torch.manual_seed(0)
    for name, model in models().items():
        model.save_pretrained(source / "models" / name)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(REPOSITORY / "src")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # PEFT's pytest settings measure coverage and turn deprecations of other libraries into errors.
    settings = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    output = ["-q", "-r", "fEX", "--disable-warnings"]
    plugins = ["-p", "manylora_conformance", "-n", "2"]
    arguments = [*settings, *output, *plugins, *(sys.argv[1:] or SUITES)]
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=source, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
