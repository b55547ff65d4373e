"""From a run to what other programs load, each export checked against the live run.

    lora.py       plain PEFT LoRA: exact, or a router's weights fixed at their mean
    static.py     a router's best plain LoRA: measured, fitted, compared
    merged.py     a Transformers folder
    gguf_files.py the merged model, or a LoRA, for llama.cpp and Ollama
    engines.py    what serving engines accept, and their command lines

What is written is checked before it gets its name (`record.written_whole`), so a failed or killed
export leaves nothing that is taken for one.
"""

from __future__ import annotations

from manylora.export.factors import lora_factors
from manylora.export.lora import export_lora
from manylora.export.record import EXPORTS_FILE, TOLERANCE, Export, ExportError

__all__ = ["EXPORTS_FILE", "TOLERANCE", "Export", "ExportError", "export_lora", "lora_factors"]
