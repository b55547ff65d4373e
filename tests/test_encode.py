"""Token ids: the prompt is what generation sees, the loss is on the answer and its end alone."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manylora.corpus import CorpusError, Encoded, Encoder, Example, Message, TooLongError

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
    return Example("t", [user(prompt), assistant(output)], source)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def encode(item: Example, tokenizer: PreTrainedTokenizerFast, max_length: int = 500) -> Encoded:
    return Encoder(tokenizer, max_length).encode(item)


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
    assert Encoder(tokenizer, 500).prompt_ids([user("Is it so?")]) == seen


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
    found = Encoder(tokenizer, 4).split_too_long([short, long])
    assert found == ([encode(short, tokenizer, 4)], [long])
    with pytest.raises(TooLongError, match=r"t\.jsonl:2: 53 tokens \(51 of them before the last"):
        encode(long, tokenizer, 52)
    assert len(encode(long, tokenizer, 53).input_ids) == 53


def conversation(*contents: str) -> Example:
    """user, assistant, user, assistant, ..."""
    roles = [user, assistant] * len(contents)
    messages = [role(content) for role, content in zip(roles, contents, strict=False)]
    return Example("t", messages, "t.jsonl:1")


def learned_texts(item: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    encoded = encode(item, tokenizer)
    return [str(tokenizer.decode(encoded.input_ids[a:b])) for a, b in encoded.learned]


def test_every_turn_of_the_assistant_is_learned_and_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    talk = conversation("one?", "uno", "two?", "dos", "three?", "tres")
    assert learned_texts(talk, tokenizer) == ["uno<|im_end|>", "dos<|im_end|>", "tres<|im_end|>"]
    encoded = encode(talk, tokenizer)
    whole = tokenizer.apply_chat_template(talk.messages, return_dict=False)
    assert encoded.input_ids == whole[:-1]  # the template's last newline is dropped
    for turn, (start, _) in zip((1, 3, 5), encoded.learned, strict=True):
        before = talk.messages[:turn]
        assert encoded.input_ids[:start] == Encoder(tokenizer, 500).prompt_ids(before)


def test_a_system_turn_and_a_tools_turn_are_read_and_not_learned() -> None:
    tokenizer = byte_tokenizer()
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        user("Weather?"),
        assistant("call()"),
        {"role": "tool", "content": "sun"},
        assistant("Sunny."),
    ]
    talk = Example("t", messages, "t.jsonl:1")
    assert learned_texts(talk, tokenizer) == ["call()<|im_end|>", "Sunny.<|im_end|>"]


def test_turns_without_a_chat_template_end_with_eos() -> None:
    tokenizer = byte_tokenizer(None)
    talk = conversation("one?", "uno", "two?", "dos")
    assert learned_texts(talk, tokenizer) == ["uno<|im_end|>", "dos<|im_end|>"]
    assert tokenizer.decode(encode(talk, tokenizer).input_ids) == (
        "one?\nuno<|im_end|>two?\ndos<|im_end|>"
    )


def test_a_template_that_thinks_only_in_the_last_turn_is_learned_as_it_writes() -> None:
    thinking = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n</think>{% endif %}"
        "{{ m['content'] }}",
    )
    talk = conversation("one?", "uno", "two?", "dos")
    assert learned_texts(talk, byte_tokenizer(thinking)) == [
        "uno<|im_end|>",
        "<think>\n</think>dos<|im_end|>",
    ]


def test_turns_without_an_end_of_turn_token_are_learned_without_one() -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talk = conversation("one?", "uno", "two?", "dos")
    assert learned_texts(talk, byte_tokenizer(plain)) == ["uno", "dos<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, None])
def test_many_at_once_are_the_same_as_one_by_one(template: str | None) -> None:
    tokenizer = byte_tokenizer(template)
    items = [example(f"answer {i}", "q" * 9 * i or "q") for i in range(9)]
    items.append(conversation("a", "b", "c", "d"))
    encoder = Encoder(tokenizer, 90 if template else 40)
    together = encoder.encode_many(items)
    for item, found in zip(items, together, strict=True):
        if isinstance(found, TooLongError):
            with pytest.raises(TooLongError):
                encoder.encode(item)
        else:
            assert found == encoder.encode(item)
    too_long = [isinstance(found, TooLongError) for found in together]
    assert any(too_long) and not all(too_long)


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_the_bound_on_tokens_holds(template: str | None, turns: int) -> None:
    """One token a byte is the most that a tokenizer can make."""
    encoder = Encoder(byte_tokenizer(template), 10_000)
    talk = conversation(*["wörd" * i for i in range(1, turns + 1)])
    size = sum(len(message["content"].encode()) for message in talk.messages)
    bound = encoder.most_tokens(np.array([size]), np.array([turns]))
    assert len(encoder.encode(talk).input_ids) <= bound[0] <= size + 60 * turns
