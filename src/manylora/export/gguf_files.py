"""GGUF files of a run: the merged model, or one LoRA adapter for each update, with a Modelfile.

A model is read back by Transformers' GGUF reader, as a base model would be. An adapter is added to
the GGUF of its base by name and row, as llama.cpp adds it, and that model is read back: an error in
names, order of rows or scale moves the logits.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from manylora.base import load_model, load_tokenizer, resolve
from manylora.base.gguf import check_gguf
from manylora.export.gguf_tensors import check_llama
from manylora.export.gguf_tokenizer import check_tokenizer
from manylora.export.gguf_write import add_adapter, write_adapter, write_model
from manylora.export.live import live_logits, logits_of, probe
from manylora.export.merged import ONLY, Update, far, merge, round_to, stored_dtype
from manylora.export.modelfile import MODELFILE, modelfile
from manylora.export.plans import Plan, load_exact, plans_of, require_unquantised
from manylora.export.record import Export, record, require_close, written_whole
from manylora.export.static import better, compare
from manylora.run import recipe_of


def export_gguf(
    run: Path,
    output: Path,
    update: Update = ONLY,
    dtype: torch.dtype | None = None,
    console: Console | None = None,
    adapter: str = "default",
) -> list[Export]:
    """Write OUTPUT/model.gguf, the merged model, and a Modelfile beside it.

    dtype: of the matrices; default: what the base is stored in.

    Raises ExportError as `merge`, and for a base that is not a plain Llama.
    """
    check_llama(AutoConfig.from_pretrained(resolve(update.base or recipe_of(run).model)))
    with written_whole(output) as partial, tempfile.TemporaryDirectory() as temporary:
        merged = merge(run, update, console, adapter)
        dtype = dtype or stored_dtype(merged.recipe.model)
        rounding = round_to(merged, dtype)
        tokenizer = load_tokenizer(merged.recipe.model)
        tokenizer.save_pretrained(temporary)
        write_model(merged.model, Path(temporary), partial / "model.gguf", dtype)
        loaded = gguf_logits(partial, merged.tokens)
        rounded = logits_of(merged.model, merged.tokens)
        require_close("model.gguf, read back", far(loaded, rounded))
        difference = far(loaded, merged.logits)
        read_back = check_tokenizer(tokenizer, Path(temporary), partial / "model.gguf")
        text, about = modelfile("model.gguf", None, tokenizer)
        (partial / MODELFILE).write_text(text, encoding="utf-8")
    note = f"{merged.about}; {rounding}; {read_back}; {about}"
    done = Export(str(output), "gguf", merged.plan.exact, difference, note, merged.gap)
    return record(run, [done])


def export_gguf_lora(
    run: Path,
    output: Path,
    update: Update = ONLY,
    console: Console | None = None,
    adapter: str = "default",
) -> list[Export]:
    """Write one GGUF LoRA adapter for each update of the run, NAME.gguf, and its NAME.Modelfile.

    update: without a task, as all are written.

    Raises ExportError as `export_lora`, and for a base that is quantised or not a plain Llama.
    """
    base = update.base or recipe_of(run).model
    check_llama(AutoConfig.from_pretrained(resolve(base)))
    tokenizer = load_tokenizer(base)
    with written_whole(output) as partial, tempfile.TemporaryDirectory() as temporary:
        model = load_exact(run, update.base)
        require_unquantised(run, model, adapter)
        if update.static:
            measured = compare(run, model, adapter, None, update.rows, console)
            found = [(one.plan, one.gap) for one in better(measured)]
        else:
            found = [(plan, {}) for plan in plans_of(run, model, adapter)]
        plans, work = [plan for plan, _ in found], Path(temporary)
        tokenizer.save_pretrained(work)
        write_model(load_model(base, "float32"), work, work / "base.gguf", torch.float32)
        differences = _write_adapters(model, adapter, plans, partial, work)
        for plan in plans:
            text, about = modelfile("BASE.gguf", f"{plan.name}.gguf", tokenizer)
            (partial / f"{plan.name}.{MODELFILE}").write_text(text, encoding="utf-8")
    exports = [
        Export(
            str(output / f"{plan.name}.gguf"),
            "gguf-lora",
            plan.exact,
            difference,
            f"{plan.note}; {about}",
            gap,
        )
        for (plan, gap), difference in zip(found, differences, strict=True)
    ]
    return record(run, exports)


def gguf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Float32 logits of FOLDER/model.gguf, read by Transformers."""
    check_gguf(folder / "model.gguf")
    with redirect_stderr(io.StringIO()):  # progress bars that ignore every switch
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file="model.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    return logits_of(model.eval(), tokens)


def _write_adapters(
    model: PeftModel, adapter: str, plans: Sequence[Plan], output: Path, work: Path
) -> list[float]:
    """Largest logit difference of each adapter, on work/base.gguf, to the live run."""
    tokens, differences = probe(model), []
    for plan in plans:
        path = output / f"{plan.name}.gguf"
        base = cast(PreTrainedModel, model.get_base_model())
        write_adapter(plan.factors(model, adapter), base.config, path)
        add_adapter(work / "base.gguf", path, work / "model.gguf")
        live = live_logits(model, adapter, plan, tokens)
        moved = far(live, gguf_logits(work, tokens))
        differences.append(require_close(f"{path.name}, added to its base as GGUF", moved))
    return differences
