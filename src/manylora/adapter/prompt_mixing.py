"""Per-prompt mixing: the branches are mixed once for a prompt, and its answer is written with that.

    with manylora.prompt_mixing(model):
        model.generate(...)

    g  = mean of g(x_t) over the prompt's real tokens t      (N), for each routed layer
    y  = W x + s (sum_i g_i B_i) A x (+ s0 B0 A0 x)          for the tokens x that follow the prompt

HydraLoRA 2404.19245, section 3.2.3: "since matrices B operate as linear functions, we initially
compute a weighted average of the experts". It does not say over which input; the mean over the
prompt is our reading, and the prompt itself is mixed per token, as in training. For one sequence
the mixture is one low-rank pair, made when the prompt is read (of rank r with a shared A, else of
the sum of the branches' ranks); for several, or a shared B, g is kept and given to the operation.
What is kept stays at its place in memory, so that a CUDA graph of a decoding step, captured after
a prompt, serves later prompts of as many sequences too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.mixing import owners
from manylora.adapter.ops import fold_scale
from manylora.adapter.state import states_of


@dataclass(frozen=True)
class Pass:
    """A forward pass of the whole model: batch sequences of so many new tokens.

    real: (batch, tokens), true where a token is not padding; None: all are. prompt: whether it
    reads a prompt rather than goes on after one.
    """

    batch: int
    tokens: int
    real: Tensor | None
    prompt: bool


@dataclass(frozen=True)
class Pair:
    """down (n k, in): rows of each of n layers; ups: (out_j, k) of each, scaling included."""

    down: Tensor
    ups: list[Tensor]

    def hidden(self, x: Tensor) -> Sequence[Tensor]:
        """(T, k) for each layer, of x (T, in)."""
        return (x @ self.down.to(x.dtype).t()).split(self.ups[0].shape[1], 1)


class PromptMixing:
    """What the layers of one model keep of the prompt that was read last.

    now: the forward pass that is running. batch: sequences of that prompt.
    """

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.batch = 0
        self._weights: dict[Any, Tensor] = {}
        self._pairs: dict[Any, Pair] = {}

    def begin(self, coming: Pass) -> None:
        self.now = coming
        if coming.prompt:
            self.batch = coming.batch

    def end(self) -> None:
        self.now = None

    def reads(self, layer: ManyLoraLayer, x: Tensor) -> bool:
        """Whether the layer's input x (..., in) is of a prompt; ValueError where none can tell."""
        rows = x.shape[:-1].numel()
        if self.now is None:
            raise ValueError(
                f"prompt_mixing: {layer.name} was called outside of the model's own forward, which "
                "says what is a prompt; call the model itself, or leave the context"
            )
        if rows != self.now.batch * self.now.tokens:
            raise ValueError(
                f"prompt_mixing: {layer.name} reads {rows} tokens where the model was given "
                f"{self.now.batch} x {self.now.tokens}, so they cannot be told apart (adapter_names"
                ", experts, an image tower); mix per token there: leave the context"
            )
        return self.now.prompt

    @torch.no_grad()
    def note(
        self, layers: Sequence[ManyLoraLayer], adapter: str, weights: Tensor, dtype: torch.dtype
    ) -> None:
        """Keep the means of mixing weights (T, n, N); dtype: of the layers' products."""
        assert self.now is not None
        batch, real = self.now.batch, self.now.real
        each = weights.unflatten(0, (batch, self.now.tokens))
        if real is None:
            mean = each.mean(1)
        else:
            # Left out rather than multiplied by 0: what padding gives may be NaN.
            total = each.masked_fill(~real[:, :, None, None], 0).sum(1)
            mean = total / real.sum(1).clamp(min=1)[:, None, None]
        for j, layer in enumerate(layers):
            _keep(self._weights, (layer, adapter, batch), mean[:, j])
        branches = layers[0].branches[adapter]
        if batch == 1 and not branches.share_B:
            self._keep_pair(layers, adapter, mean[0], dtype)

    def _keep_pair(
        self, layers: Sequence[ManyLoraLayer], adapter: str, mean: Tensor, dtype: torch.dtype
    ) -> None:
        rows, ups = [], []
        for layer, weights in zip(layers, mean, strict=True):
            t = layer.tensors(adapter)
            rows += [t[part].to(dtype) for part in ("A", "shared_A") if part in t]
            ups.append(mixed_up(layer, adapter, weights).to(dtype))
        key = (*layers, adapter)
        if key not in self._pairs or self._pairs[key].down.dtype != dtype:
            self._pairs[key] = Pair(_place(torch.cat(rows)), [_place(up) for up in ups])
        kept = self._pairs[key]
        torch.cat(rows, out=kept.down)
        for place, up in zip(kept.ups, ups, strict=True):
            place.copy_(up)

    def pair(self, layers: Sequence[ManyLoraLayer], adapter: str, x: Tensor) -> Pair | None:
        """What adds these layers' mixture to what follows one prompt; None: see `weights`."""
        if self.reads(layers[0], x) or self.batch != 1 or len(x) != 1:
            return None
        return self._pairs.get((*layers, adapter))

    def weights(self, layers: Sequence[ManyLoraLayer], adapter: str) -> Tensor:
        """Mixing weights (batch, n, N) of the tokens that follow the prompts."""
        assert self.now is not None
        keys = [(layer, adapter, self.batch) for layer in layers]
        if keys[0] not in self._weights:
            raise ValueError(
                f"prompt_mixing: no prompt was read with adapter {adapter!r} in this context; give "
                "the model the prompt first, and then one new token at a time, with its cache"
            )
        repeats, rest = divmod(self.now.batch, self.batch)
        if rest:
            raise ValueError(
                f"prompt_mixing: {self.now.batch} sequences go on after {self.batch} prompts; it "
                "must be as many, or for beams and returned sequences a multiple"
            )
        found = torch.stack([self._weights[key] for key in keys], 1)
        return found if repeats == 1 else found.repeat_interleave(repeats, 0)


def mixed_up(layer: ManyLoraLayer, adapter: str, weights: Tensor) -> Tensor:
    """What the rows of A and the shared A are multiplied by, for weights g (N,).

    [s sum_i g_i B_i | s0 B0] (out, r + shared rank) of a shared A; where each branch has its own,
    [s g_1 B_1 ... s g_N B_N | s0 B0].
    """
    branches, t = layer.branches[adapter], layer.tensors(adapter)
    B = fold_scale(t["B"], branches, t.get("scale")).to(weights.dtype)
    if branches.share_A:
        blocks = B.unflatten(1, (branches.count, branches.ranks[0]))
        up = layer.scaling[adapter] * (blocks * weights[:, None]).sum(1)
    else:
        up = layer.scaling[adapter] * (B * (weights @ owners(branches.ranks, weights)))
    if not branches.shared_rank:
        return up
    return torch.cat([up, layer.shared_scaling[adapter] * t["shared_B"].to(up.dtype)], 1)


def _keep(store: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    if key not in store or store[key].dtype != value.dtype:
        store[key] = _place(value)
    store[key].copy_(value)


def _place(like: Tensor) -> Tensor:
    # What is made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@contextmanager
def prompt_mixing(model: nn.Module) -> Iterator[None]:
    """Mix a router's branches once for each prompt, instead of anew for every token that follows.

    A forward pass of several new tokens, or with nothing in its cache, reads prompts: it mixes per
    token, and each routed layer keeps the mean of its mixing weights over a sequence's tokens
    (attention_mask says which are no padding). A pass of one new token a sequence, with a cache,
    uses those means. Around generate, or around a loop of your own that passes past_key_values.
    A prompt that is read in pieces is several prompts, of which the last counts; without a cache,
    or with several guessed tokens at once (assisted decoding), every pass is a prompt.
    CUDA graphs captured inside are of use until the context ends. (On a GPU, a static cache that
    was reset looks full without waiting for it: there, a prompt needs two tokens.)

    Raises:
        ValueError: no active adapter has a router; the model is an encoder-decoder; or, from the
            forward pass, it cannot be told which tokens are a prompt's.
    """
    layers = layers_of(model)
    whole = _whole(model)
    _check(layers, whole)
    states = states_of(layers)
    mixing, before = PromptMixing(), [state.prompt for state in states]
    names = list(inspect.signature(whole.forward).parameters)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        mixing.begin(_coming(given, states[0].token_mask))

    handles = [
        whole.register_forward_pre_hook(begin, with_kwargs=True),
        whole.register_forward_hook(lambda *_: mixing.end(), always_call=True),
    ]
    for state in states:
        state.prompt = mixing
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for state, old in zip(states, before, strict=True):
            state.prompt = old


def _whole(model: nn.Module) -> nn.Module:
    """The model that generate calls, inside of PEFT's wrappers."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _check(layers: Sequence[ManyLoraLayer], whole: nn.Module) -> None:
    active = [
        layer.branches[name]
        for layer in layers
        for name in layer.active_adapters
        if name in layer.branches
    ]
    if not any(branches.gate == "router" for branches in active):
        gates = sorted({branches.gate for branches in active})
        raise ValueError(
            "prompt_mixing: no active adapter of this model has a router (gate="
            f"{', '.join(map(repr, gates)) or 'none at all'}), so there is nothing to mix per "
            "prompt; leave the context, or activate a hydralora or lora_moe adapter"
        )
    if isinstance(whole, PreTrainedModel) and whole.config.is_encoder_decoder:
        raise ValueError(
            f"prompt_mixing: {type(whole).__name__} is an encoder-decoder, whose prompt and answer "
            "are read by different layers; only decoders are mixed per prompt"
        )


def _coming(given: dict[str, Any], token_mask: Tensor | None) -> Pass:
    """What a forward pass with these arguments is."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:
        raise ValueError("prompt_mixing: the model was given neither input_ids nor inputs_embeds")
    batch, count = tokens.shape[:2]
    cache = given.get("past_key_values", given.get("cache_params"))
    empty = cache is None or (isinstance(cache, Cache) and not cache.is_initialized)
    if count == 1 and not empty:
        return Pass(batch, count, None, prompt=False)
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if token_mask is None:
            raise ValueError(
                "prompt_mixing: the attention mask that the model was given does not say which "
                "tokens are padding; pass attention_mask (batch, tokens) to generate or forward"
            )
        mask = None
    return Pass(batch, count, _real(token_mask if mask is None else mask, batch, count), True)


def _real(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """(batch, tokens) of a mask of (prompts, tokens so far), as generate repeats its prompts."""
    if mask is None:
        return None
    if batch % len(mask) or mask.shape[1] < tokens:
        raise ValueError(
            f"prompt_mixing: a mask of shape {tuple(mask.shape)} does not fit {batch} sequences of "
            f"{tokens} new tokens"
        )
    return mask[:, mask.shape[1] - tokens :].bool().repeat_interleave(batch // len(mask), 0)
