"""How much memory a recipe needs: an estimate from the shapes alone, before any weight is loaded.

With T = batch size x longest row (tokens), L blocks, b bytes a number in the recipe's precision
(4 for fp32, else 2), and the sums over the linear layers of all blocks:

    weights      parameters x bytes of dtype; 4bit 0.55, 8bit 1.05 in the blocks, the rest 4
    adapter      trained parameters x 16: weight, gradient and AdamW's two moments in float32
    cast copies  under autocast, the frozen weights in half precision: backward needs them
    activations  T x slack x ( sum out x b + inputs x b + z x b + L x (8 hidden + b widest) )
    logits       one tile of the head: positions x min(vocabulary, 32768)

`inputs` are those of the adapted layers, once where q, k and v (gate and up) are computed together;
`z` is what A and the router make of them. `8 hidden` are the two float32 inputs of the norms,
`widest` the product in the feed-forward layer. With gradient checkpointing one block is alive, and
of the others their inputs. `slack` is the memory allocator's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from manylora.adapter.config import ManyLoraConfig
from manylora.adapter.layer import layers_of
from manylora.adapter.sharing import SIBLINGS
from manylora.base import load_tokenizer
from manylora.corpus import Corpus, Encoder, Example
from manylora.methods import Branches, count_parameters
from manylora.precision import resolve_precision
from manylora.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BYTES = {"4bit": 0.55, "8bit": 1.05}
BYTES_PER_TRAINED = 16

# Before any weight: Python with its libraries; on a GPU, the CUDA context.
BASELINE = {"cpu": 0.6e9, "cuda": 0.5e9}
# Measured on glibc, which keeps holes between the blocks it freed; larger blocks, larger holes.
# Not measured on a GPU, whose allocator wastes less.
SLACK = {("cpu", 2): 1.5, ("cpu", 4): 2.0, ("cuda", 2): 1.15, ("cuda", 4): 1.15}
# TRL's loss works on tiles of this many positions and words. Without Triton a tile holds every
# position, not the answers alone, and about eight float32 copies of it live at once.
TILE_TOKENS, TILE_WORDS = 4096, 32768
TILE_BYTES = {"cpu": 32, "cuda": 8}
ROWS_TO_MEASURE = 50


@dataclass(frozen=True)
class Part:
    """One line of the estimate: how many bytes for what, and where the number comes from."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Estimate:
    base_parameters: int
    adapter_parameters: int
    parts: list[Part]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass
class Shapes:
    """What the formula reads off a model without weights."""

    parameters: int
    hidden: int
    vocabulary: int
    blocks: int
    linears: dict[str, tuple[int, int]]
    adapted: dict[str, Branches] = field(default_factory=dict)

    @property
    def linear_parameters(self) -> int:
        return sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def adapter_parameters(self) -> int:
        return sum(
            count_parameters(branches, [self.linears[name]])
            for name, branches in self.adapted.items()
        )


def estimate(
    recipe: Recipe, source: str, tasks: int, longest: int, answers: int, device: torch.device
) -> Estimate:
    """The memory that training needs on `device`.

    Args:
        source: folder or cached hub name of the base model; only its config is read.
        longest, answers: tokens of the longest row, and of the longest answer.

    Raises OSError or ValueError when the config cannot be read or the adapter does not fit it.
    """
    shapes = read_shapes(source, recipe.config(tasks))
    kind = "cuda" if device.type == "cuda" else "cpu"
    precision = resolve_precision(recipe.train.precision, device)
    width = 4 if precision == "fp32" else 2
    slack, batch = SLACK[kind, width], recipe.train.batch_size
    weights, how = _weights(recipe, shapes)
    trained = shapes.adapter_parameters
    parts = [
        Part("libraries" if kind == "cpu" else "CUDA", int(BASELINE[kind]), "measured once"),
        Part("base weights", weights, how),
        Part(
            "adapter",
            trained * BYTES_PER_TRAINED,
            f"{trained:,} x 16 bytes (weight, gradient, 2 AdamW moments)",
        ),
    ]
    copies = int(_cast_copies(recipe, shapes, precision) * slack)
    if copies:
        parts.append(Part("cast copies", copies, f"the frozen weights once more in {precision}"))
    per_token = token_bytes(recipe, shapes, width)
    how = f"{batch} rows x {longest} tokens x {per_token / 1e6:.2f} MB x {slack} for the allocator"
    if recipe.train.gradient_checkpointing:
        how += ", gradient checkpointing"
    parts.append(Part("activations", int(batch * longest * per_token * slack), how))
    positions = min(batch * (longest if kind == "cpu" else answers), TILE_TOKENS)
    words = min(shapes.vocabulary, TILE_WORDS)
    parts.append(
        Part(
            "logits",
            positions * words * TILE_BYTES[kind] + words * shapes.hidden * 4,
            f"a tile of {positions:,} positions x {words:,} words",
        )
    )
    return Estimate(shapes.parameters, trained, parts)


def longest_rows(corpus: Corpus, source: str, max_length: int) -> tuple[int, int]:
    """Tokens of the longest row and answer, among each task's rows with the most bytes."""
    some: list[Example] = []
    for rows in corpus.train.values():
        some += rows.at(np.argsort(rows.sizes, kind="stable")[-ROWS_TO_MEASURE:])
    encoded, too_long = Encoder(load_tokenizer(source), max_length).split_too_long(some)
    if too_long:  # those are left out of training; the next shorter ones may be just below
        return max_length, max_length
    longest = max(len(item.input_ids) for item in encoded)
    return longest, max(item.answer_tokens for item in encoded)


def read_shapes(source: str, config: ManyLoraConfig) -> Shapes:
    """Build the model on the meta device, which holds shapes and no numbers, and attach."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        )
    head = model.get_output_embeddings()
    hidden, vocabulary = _size(model.get_input_embeddings())
    shapes = Shapes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=hidden,
        vocabulary=vocabulary,
        blocks=int(model.config.get_text_config().num_hidden_layers),
        linears={
            name: _size(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        },
    )
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    for layer in layers_of(adapted):
        shapes.adapted[layer.name] = layer.branches["default"]
        shapes.linears.setdefault(layer.name, (layer.in_features, layer.out_features))
    return shapes


def token_bytes(recipe: Recipe, shapes: Shapes, width: int) -> float:
    """Bytes that backward needs for each token of a batch, over all blocks."""
    config = recipe.config()
    total = 0.0
    inputs = set()
    for name, (n_in, n_out) in shapes.linears.items():
        total += n_out * width
        if (branches := shapes.adapted.get(name)) is None:
            continue
        parent, _, own = name.rpartition(".")
        together = next((names for names in SIBLINGS if own in names), own)
        if config.lora_dropout and width == 2:  # each its own copy in half precision
            together = own
        inputs.add((parent, together, n_in))
        total += (branches.rows_A + branches.shared_rank) * width
        if branches.gate != "ones":
            total += branches.count * 4
    total += sum(n_in * width for _, _, n_in in inputs)
    widest = max(max(size) for size in shapes.linears.values())
    total += shapes.blocks * (8 * shapes.hidden + width * widest)
    if recipe.train.gradient_checkpointing:
        total = total / shapes.blocks + shapes.blocks * shapes.hidden * 4
    return total


def _weights(recipe: Recipe, shapes: Shapes) -> tuple[int, str]:
    if recipe.quantize is None:
        each = DTYPE_BYTES[recipe.dtype]
        return shapes.parameters * each, f"{shapes.parameters:,} x {each} bytes ({recipe.dtype})"
    # prepare_model_for_kbit_training turns what is not quantised to float32.
    packed, share = shapes.linear_parameters, QUANTIZED_BYTES[recipe.quantize]
    rest = shapes.parameters - packed
    return int(packed * share + rest * 4), f"{packed:,} x {share} bytes, {rest:,} x 4"


def _cast_copies(recipe: Recipe, shapes: Shapes, precision: str) -> int:
    same = {"bf16": "bfloat16", "fp16": "float16", "fp32": recipe.dtype}[precision]
    frozen = 0 if recipe.quantize or recipe.dtype == same else shapes.linear_parameters
    trained = 0 if precision == "fp32" else shapes.adapter_parameters
    alive = shapes.blocks if recipe.train.gradient_checkpointing else 1
    return 2 * (frozen + trained) // alive


def _size(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
