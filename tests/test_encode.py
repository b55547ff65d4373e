"""Token ids: the prompt is what generation sees, the loss is on the answer and its end alone."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manylora.corpus import (
    Collator,
    CorpusError,
    Example,
    TooLongError,
    dataset_rows,
    encode,
    encode_all,
    prompt_ids,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and pad == eos as in the default model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | special
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        extra_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        **names,
    )


def example(output: str = "yes", prompt: str = "Is it so?", source: str = "t.jsonl:1") -> Example:
    return Example("t", prompt, "", output, source)


def parts(
    item: Example, tokenizer: PreTrainedTokenizerFast, max_length: int = 500
) -> tuple[str, str]:
    encoded = encode(item, tokenizer, max_length)
    before = encoded.input_ids[: encoded.prompt_length]
    learned = encoded.input_ids[encoded.prompt_length :]
    return str(tokenizer.decode(before)), str(tokenizer.decode(learned))


def test_the_prompt_tokens_are_those_that_generation_sees() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(example(), tokenizer, 500)
    seen = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it so?"}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[: encoded.prompt_length] == seen
    assert prompt_ids("Is it so?", tokenizer) == seen


def test_the_learned_part_is_the_answer_and_the_end_of_turn_alone() -> None:
    tokenizer = byte_tokenizer()
    before, learned = parts(example(), tokenizer)
    assert before == "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
    assert learned == "yes<|im_end|>"
    encoded = encode(example(), tokenizer, 500)
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.answer_tokens == len("yes") + 1


@pytest.mark.parametrize("answer", ["e", "im", "end", "<|", "a\nb", "assistant"])
def test_an_answer_that_is_a_piece_of_the_template_is_learned_once(answer: str) -> None:
    assert parts(example(answer), byte_tokenizer())[1] == f"{answer}<|im_end|>"


def test_without_a_chat_template_the_answer_follows_a_new_line() -> None:
    tokenizer = byte_tokenizer(None)
    assert parts(example(), tokenizer) == ("Is it so?\n", "yes<|im_end|>")


def test_without_a_chat_template_the_tokenizers_own_start_is_kept_and_its_end_is_not() -> None:
    tokenizer = byte_tokenizer(None, bos_token="<s>")
    ends = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<|im_end|>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=list(ends.items())
    )
    assert parts(example(), tokenizer) == ("<s>Is it so?\n", "yes<|im_end|>")


def test_a_template_whose_end_of_turn_is_not_eos_teaches_its_own() -> None:
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert parts(example(), tokenizer)[1] == "yes<|im_end|>"


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    before, learned = parts(example(" yes \n"), byte_tokenizer(plain))
    assert before == "user: Is it so?\nassistant: "
    assert learned == "yes<|im_end|>"


def test_what_the_template_puts_before_the_answer_is_learned() -> None:
    thinking = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}<think>\n</think>{% endif %}{{ m['content'] }}",
    )
    assert parts(example(), byte_tokenizer(thinking))[1] == "<think>\n</think>yes<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}: {{ messages[-1]['content'] }}",  # rewrites the prompt
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",  # drops
    ],
)
def test_a_template_that_does_not_continue_the_prompt_is_an_error(template: str) -> None:
    with pytest.raises(CorpusError, match=r"t\.jsonl:1: the chat template of"):
        encode(example(), byte_tokenizer(template), 500)


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(CorpusError, match="no end-of-sequence token"):
        encode(example(), tokenizer, 500)


def test_too_long_examples_are_given_back_and_nothing_is_cut() -> None:
    tokenizer = byte_tokenizer(None)
    short, long = example("b", "a"), example("b", "a" * 50, "t.jsonl:2")
    assert encode_all([short, long], tokenizer, 4) == ([encode(short, tokenizer, 4)], [long])
    with pytest.raises(TooLongError, match=r"t\.jsonl:2: 53 tokens \(51 of them the prompt\)"):
        encode(long, tokenizer, 52)
    assert len(encode(long, tokenizer, 53).input_ids) == 53


def test_a_batch_is_padded_on_the_left_and_keeps_the_end_of_turn_in_the_loss() -> None:
    tokenizer = byte_tokenizer(None)
    items = [
        Example("b", "q", "", "long answer", "b.jsonl:1"),
        Example("a", "question", "", "x", "a.jsonl:1"),
    ]
    encoded, _ = encode_all(items, tokenizer, 100)
    assert isinstance(tokenizer.pad_token_id, int)
    batch = Collator(tokenizer.pad_token_id, ["a", "b"])(dataset_rows(encoded, ["a", "b"]))
    assert batch["task_ids"].tolist() == [1, 0]
    for number, item in enumerate(encoded):
        size = len(item.input_ids)
        assert batch["input_ids"][number, 14 - size :].tolist() == item.input_ids
        assert batch["attention_mask"][number].tolist() == [0] * (14 - size) + [1] * size
        assert batch["position_ids"][number, 14 - size :].tolist() == list(range(size))
        labels = batch["labels"][number]
        learned = item.input_ids[item.prompt_length :]
        assert labels[labels != -100].tolist() == learned
        assert labels[-len(learned) :].tolist() == learned
        assert learned[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert all(value.dtype == torch.long for value in batch.values())


def test_a_row_of_an_unknown_task_is_an_error() -> None:
    with pytest.raises(CorpusError, match="task_id=2"):
        Collator(0, ["a"])([{"input_ids": [1, 2], "prompt_length": 1, "task_id": 2}])
