"""Per-prompt mixing: the branches are mixed once for a prompt, then decoded with that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, StaticCache

import manylora
from manylora.adapter.layer import ManyLoraLayer, layers_of
from manylora.adapter.prompt_mixing import Pass, PromptMixing, mixed_up
from manylora.adapter.router import router_weights
from tiny import VOCAB, attach, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "hydralora": {"method": "hydralora"},
    "hydralora, shared branch": {"method": "hydralora", "shared_rank": 2},
    "hydralora on Ax": {"method": "hydralora", "router_input": "Ax"},
    "lora_moe": {"method": "lora_moe"},
    "lora_moe, uneven": {"method": "lora_moe", "branch_ranks": [1, 3, 2]},
}
by_kind = pytest.mark.parametrize("kind", list(KINDS))
DRAWN = torch.Generator().manual_seed(0)
PROMPTS = torch.randint(3, VOCAB, (3, 9), generator=DRAWN)
ANSWERS = torch.randint(3, VOCAB, (3, 4), generator=DRAWN)
CLOSE = {"rtol": 0.0, "atol": 1e-12}


def adapted(kind: str = "hydralora") -> PeftModel:
    # Eager attention gives NaN where padding on the left may attend to nothing.
    base = tiny_llama(dtype=torch.float64, attn_implementation="sdpa")
    fields = {"r": 3, "init_weights": False, "task_type": "CAUSAL_LM"} | KINDS[kind]
    model = attach(base, **fields).to(torch.float64).eval()
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "manylora_" in name:  # large enough that a wrong mixture is seen
            nn.init.normal_(tensor, std=0.5)
    return model


def zero_routers(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        nn.init.zeros_(layer.manylora_router["default"].weight)
    return model


@torch.no_grad()
def decoded(
    model: nn.Module,
    prompts: Tensor = PROMPTS,
    answers: Tensor = ANSWERS,
    mask: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Logits of the last prompt token and of each answer token, given one at a time."""
    mask = torch.ones_like(prompts) if mask is None else mask
    cache = DynamicCache() if cache is None else cache
    found = []
    for tokens in (prompts, *answers.unsqueeze(-1).unbind(1)):
        if found:
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def per_prompt(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with manylora.prompt_mixing(model):
        return decoded(model, *args, **kwargs)


class Loop:
    """Every routed layer by hand: a loop over branches, with the prompt's mean weights after it."""

    def __init__(self, model: nn.Module) -> None:
        self.mean: dict[str, Tensor] = {}
        for layer in layers_of(model):
            layer.forward = self.forward_of(layer)  # type: ignore[method-assign]

    def forward_of(self, layer: ManyLoraLayer) -> Any:
        t, branches = layer.tensors("default"), layer.branches["default"]

        def forward(x: Tensor) -> Tensor:
            g = router_weights(x if branches.router_input == "x" else x @ t["A"].T, t["router"])
            if x.shape[1] > 1:
                self.mean[layer.name] = g.mean(1, keepdim=True)
            else:
                g = self.mean[layer.name]
            y = layer.base_layer(x)
            ends = torch.tensor(branches.ranks).cumsum(0).tolist()
            for i, (r, end) in enumerate(zip(branches.ranks, ends, strict=True)):
                own = slice(end - r, end)
                A = t["A"] if branches.share_A else t["A"][own]
                y = y + layer.scaling["default"] * g[..., i : i + 1] * (x @ A.T @ t["B"][:, own].T)
            if branches.shared_rank:
                y = y + layer.shared_scaling["default"] * (x @ t["shared_A"].T @ t["shared_B"].T)
            return y

        return forward


@by_kind
@pytest.mark.parametrize("batch", [1, 3])
def test_an_answer_is_mixed_with_the_means_of_its_prompt(kind: str, batch: int) -> None:
    model, reference = adapted(kind), adapted(kind)
    given = (PROMPTS[:batch], ANSWERS[:batch])
    ours, plain = per_prompt(model, *given), decoded(model, *given)
    torch.testing.assert_close(ours[:, 0], plain[:, 0], **CLOSE)  # the prompt: per token
    assert (ours[:, 1:] - plain[:, 1:]).abs().amax((0, 2)).min() > 1e-3
    Loop(reference)
    torch.testing.assert_close(ours, decoded(reference, *given), **CLOSE)


@by_kind
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_that_are_the_same_for_all_tokens_give_the_same_answer(
    kind: str, batch: int
) -> None:
    model, given = zero_routers(adapted(kind)), (PROMPTS[:batch], ANSWERS[:batch])
    torch.testing.assert_close(per_prompt(model, *given), decoded(model, *given), **CLOSE)


@pytest.mark.parametrize("kind", ["hydralora", "lora_moe"])
def test_padding_and_batch_mates_do_not_count(kind: str) -> None:
    model, lengths = adapted(kind), [9, 5, 2]
    mask = torch.tensor([[int(i >= 9 - n) for i in range(9)] for n in lengths])
    batch = per_prompt(model, PROMPTS * mask, mask=mask)
    for i, n in enumerate(lengths):
        alone = per_prompt(model, PROMPTS[i : i + 1, -n:], ANSWERS[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["hydralora, shared branch", "lora_moe", "lora_moe, uneven"])
def test_the_pair_of_a_prompt_is_the_weight_update_with_its_weights(kind: str) -> None:
    model = adapted(kind)
    for layer in layers_of(model):
        g, t = torch.rand(3, dtype=torch.float64), layer.tensors("default")
        down = torch.cat([t[part] for part in ("A", "shared_A") if part in t])
        update = layer.get_delta_weight("default", g)
        torch.testing.assert_close(mixed_up(layer, "default", g) @ down, update, **CLOSE)


def test_a_second_prompt_forgets_the_first() -> None:
    model, first, second = adapted(), (PROMPTS[:1], ANSWERS[:1]), (PROMPTS[1:2], ANSWERS[1:2])
    alone = per_prompt(model, *second)
    with manylora.prompt_mixing(model):
        decoded(model, *first)
        decoded(model)  # three at once, in between
        assert torch.equal(decoded(model, *second), alone)
        one_token = decoded(model, PROMPTS[:1, :1], ANSWERS[:1])
    assert torch.equal(one_token, per_prompt(model, PROMPTS[:1, :1], ANSWERS[:1]))


def test_after_the_context_everything_is_as_before() -> None:
    model = adapted()
    before = decoded(model)
    with pytest.raises(IndexError), manylora.prompt_mixing(model):
        decoded(model, PROMPTS + VOCAB)  # no such tokens
    assert torch.equal(decoded(model), before)
    whole = model.get_base_model()
    assert not whole._forward_pre_hooks and not whole._forward_hooks
    assert all(layer.state.prompt is None for layer in layers_of(model))


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_that_read_the_same_input_are_each_layer_alone(batch: int) -> None:
    together, alone = adapted(), adapted()
    for layer in layers_of(alone):
        layer.siblings = []
    given = (PROMPTS[:batch], ANSWERS[:batch])
    torch.testing.assert_close(per_prompt(together, *given), per_prompt(alone, *given), **CLOSE)


def test_layers_that_cannot_be_computed_with_their_base_are_mixed_per_prompt_too() -> None:
    plain, hooked = adapted(), adapted()
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers_of(hooked):
        base = layer.get_base_layer()
        base.register_forward_hook(lambda *a: seen.append((a[2], a[2].clone())) or None)
    given = (PROMPTS[:1], ANSWERS[:1])
    torch.testing.assert_close(per_prompt(hooked, *given), per_prompt(plain, *given), **CLOSE)
    assert seen and all(torch.equal(y, copy) for y, copy in seen)  # nothing was written over


@pytest.mark.parametrize("kind", ["hydralora", "lora_moe"])
@torch.no_grad()
def test_a_recorded_decoding_step_serves_the_next_prompt(kind: str) -> None:
    """As a CUDA graph is: recorded once, what it reads left in place, nothing asked of the host."""
    model, token = adapted(kind), ANSWERS[:1, :1]
    cache = StaticCache(model.config, max_cache_len=16)

    def read(prompt: Tensor) -> None:
        cache.reset()
        model(input_ids=prompt, past_key_values=cache)

    def step(token: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache).logits

    found = []
    with manylora.prompt_mixing(model):
        read(PROMPTS[:1])
        recorded = make_fx(step)(token)
        for prompt in (PROMPTS[:1], PROMPTS[1:2]):
            for run in (recorded, step):
                read(prompt)
                found.append(run(token))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert (found[0] - found[2]).abs().max() > 1e-3
    asked = [str(node.target) for node in recorded.graph.nodes]
    assert not any(name in one for one in asked for name in ("_local_scalar", "nonzero"))


@torch.no_grad()
def test_a_prompt_may_be_read_in_inference_mode_and_the_next_one_outside_of_it() -> None:
    model = adapted()
    with manylora.prompt_mixing(model):
        with torch.inference_mode():
            decoded(model, PROMPTS[:1], ANSWERS[:1])
        outside = decoded(model, PROMPTS[1:2], ANSWERS[1:2])
    assert torch.equal(outside, per_prompt(model, PROMPTS[1:2], ANSWERS[1:2]))


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_what_a_loop_writes(batch: int) -> None:
    model, prompts = adapted(), PROMPTS[:batch]
    mask = torch.ones_like(prompts)
    with manylora.prompt_mixing(model):
        written = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )[:, 9:]
    chosen = per_prompt(model, prompts, written).argmax(-1)
    assert torch.equal(chosen[:, :4], written)


def test_beams_and_returned_sequences_keep_the_weights_of_their_prompt() -> None:
    model, mask = adapted(), torch.ones_like(PROMPTS)
    mask[1, :4] = 0
    how = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": None}
    with manylora.prompt_mixing(model):
        together = model.generate(input_ids=PROMPTS, attention_mask=mask, **how)[:, 9:]
        rows = [
            model.generate(input_ids=row[None, keep], attention_mask=mask[None, i, keep], **how)
            for i, (row, keep) in enumerate(zip(PROMPTS, mask.bool(), strict=True))
        ]
    assert torch.equal(together, torch.cat([row[:, -4:] for row in rows]))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_takes_the_padding_from_the_mask_that_generate_was_given(
    beams: int,
) -> None:
    model, mask = adapted(), torch.ones_like(PROMPTS)
    mask[1, :6] = 0
    inputs = {"input_ids": PROMPTS, "attention_mask": mask, "num_beams": beams}
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with manylora.prompt_mixing(model):
        dynamic = model.generate(**inputs, **how)
        static = model.generate(**inputs, **how, cache_implementation="static")
        with pytest.raises(ValueError, match="does not say which tokens are padding"):
            model.get_base_model().generate(**inputs, **how, cache_implementation="static")
    assert torch.equal(static, dynamic)


@torch.no_grad()
def test_the_next_turn_of_a_conversation_is_a_prompt_of_its_own() -> None:
    model, turn = adapted(), PROMPTS.flip(1)[:, :4]
    mask = torch.ones_like(PROMPTS)
    mask[1, :6] = 0

    def answered(first: Tensor, mask: Tensor, rows: slice) -> Tensor:
        cache = DynamicCache()
        with manylora.prompt_mixing(model):
            decoded(model, first, turn[rows, :0], mask, cache)
            mask = torch.cat([mask, torch.ones_like(turn[rows])], 1)
            return decoded(model, turn[rows], ANSWERS[rows], mask, cache)

    together = answered(PROMPTS, mask, slice(None))
    alone = answered(PROMPTS[1:2, 6:], mask[1:2, 6:], slice(1, 2))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-11)


def test_what_a_router_gives_for_padding_is_left_out_even_if_it_is_nan() -> None:
    layer, mixing = layers_of(adapted())[0], PromptMixing()
    mixing.begin(Pass(1, 3, torch.tensor([[False, True, True]]), prompt=True))
    weights = torch.tensor([[torch.nan] * 3, [0.5, 0.25, 0.25], [0.7, 0.05, 0.25]])
    mixing.note([layer], "default", weights[:, None], torch.float32)
    torch.testing.assert_close(
        mixing.weights([layer], "default"), torch.tensor([[[0.6, 0.15, 0.25]]])
    )


def test_a_cache_repeated_for_several_answers_repeats_the_weights() -> None:
    model, cache = adapted(), DynamicCache()
    with manylora.prompt_mixing(model), torch.no_grad():
        model(input_ids=PROMPTS[:2], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        answers = ANSWERS[:2].repeat_interleave(2, 0)
        found = model(input_ids=answers[:, :1], past_key_values=cache).logits
        with pytest.raises(ValueError, match="3 sequences go on after 2 prompts"):
            model(input_ids=ANSWERS[:, :1], past_key_values=cache)
    alone = per_prompt(model, PROMPTS[:2], ANSWERS[:2, :1])[:, 1]
    torch.testing.assert_close(found[:, 0], alone.repeat_interleave(2, 0), **CLOSE)


def test_what_has_no_prompt_to_mix_is_refused_with_the_reason() -> None:
    with (
        pytest.raises(ValueError, match="no active adapter of this model has a router"),
        manylora.prompt_mixing(attach(tiny_llama(), method="multilora")),
    ):
        pass
    with pytest.raises(ValueError, match="router"), manylora.prompt_mixing(tiny_llama()):
        pass
    model, cache = adapted(), DynamicCache()
    model(input_ids=PROMPTS, past_key_values=cache)
    with manylora.prompt_mixing(model):
        with pytest.raises(ValueError, match="no prompt was read with adapter 'default'"):
            model(input_ids=ANSWERS[:, :1], past_key_values=cache)
        decoded(model, PROMPTS[:1], ANSWERS[:1])
        model(input_ids=PROMPTS)
        with pytest.raises(ValueError, match="1 sequences go on after 3 prompts"):
            model(input_ids=ANSWERS[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="outside of the model's own forward"):
            model.get_base_model().get_decoder()(input_ids=PROMPTS)
        with pytest.raises(ValueError, match="adapter_names"):
            model(input_ids=PROMPTS, adapter_names=["default", "__base__", "default"])
