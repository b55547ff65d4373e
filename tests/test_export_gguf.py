"""GGUF files of a run: read back, and compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file
from transformers import AutoTokenizer

import manylora
from manylora.base import load_model
from manylora.export import ExportError, export_lora, gguf_write
from manylora.export.gguf_files import export_gguf, export_gguf_lora
from manylora.export.gguf_tensors import LlamaNames, check_llama
from manylora.export.gguf_tokenizer import splitting
from manylora.export.gguf_write import read_adapter, write_model
from manylora.export.merged import Update
from manylora.export.modelfile import FORMATS, modelfile
from manylora.recipe import Recipe
from manylora.run import recipe_of
from manylora.train import train
from tiny import save_tiny_model, tiny_llama
from tiny_gguf import FIELDS, write_gguf

Make = Callable[..., Recipe]
TOKENS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a merge in its tokenizer, which llama.cpp wants."""
    folder = save_tiny_model(tmp_path_factory.mktemp("merging"), vocab_size=260)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["sk"] = 259
    saved["model"]["merges"] = [["s", "k"]]
    path.write_text(json.dumps(saved))
    return folder


def test_file_has_the_tensors_and_sizes_of_one_laid_out_as_llama_cpp_does(
    tmp_path: Path,
) -> None:
    """`tiny_gguf` writes the same model by itself, from the layout alone."""
    theirs = GGUFReader(str(write_gguf(tmp_path / "theirs.gguf")))
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="theirs.gguf").save_pretrained(tmp_path)
    write_model(tiny_llama(**FIELDS), tmp_path, tmp_path / "ours.gguf", torch.float32)
    ours = GGUFReader(str(tmp_path / "ours.gguf"))
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert (found[tensor.name].data == tensor.data).all(), tensor.name
    for key, field in theirs.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            assert ours.fields[key].contents() == field.contents(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_file_is_a_base_model_with_the_logits_of_the_run(
    make_recipe: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    run = train(make_recipe(method="multilora"))
    (done,) = export_gguf(run, tmp_path / "out", dtype=dtype)
    assert done.exact
    model, tokenizer = manylora.load(run)
    file = tmp_path / "out" / "model.gguf"
    with torch.inference_mode():
        live = model.cpu()(input_ids=TOKENS).logits
        got = load_model(str(file))(input_ids=TOKENS).logits
    near = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    assert torch.allclose(got, live, atol=near) and done.max_logit_difference < near
    if dtype != torch.float32:
        assert not torch.allclose(got, live, atol=1e-6)
        assert f"rounding to {str(dtype)[6:]} moved a logit" in done.note
    again = manylora.base.load_tokenizer(str(file))
    for text in ("sky 1", "grün, 17 words?\n\n  two", "<|user|>x<|end|>"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template


def test_lora_file_adds_what_the_plain_lora_adds(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe(method="branch_per_cluster", shared_rank=2))
    done = export_gguf_lora(run, tmp_path / "gguf")
    assert [Path(export.path).name for export in done] == [
        "colour.gguf",
        "copy.gguf",
        "parity.gguf",
        "shared.gguf",
    ]
    assert all(export.exact and export.max_logit_difference < 1e-4 for export in done)
    export_lora(run, tmp_path / "lora")
    plain = load_file(tmp_path / "lora" / "copy" / "adapter_model.safetensors")
    reader = GGUFReader(str(tmp_path / "gguf" / "copy.gguf"))
    fields = {key: reader.fields[key].contents() for key in reader.fields if "." in key[1:]}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= names
    assert all(name.endswith((".weight.lora_a", ".weight.lora_b")) for name in names)
    rank = plain["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape[0]
    assert fields["adapter.lora.alpha"] == rank
    updates = read_adapter(tmp_path / "gguf" / "copy.gguf")
    for module, name, heads in (
        ("mlp.up_proj", "blk.1.ffn_up.weight", None),
        ("self_attn.q_proj", "blk.1.attn_q.weight", 4),
        ("self_attn.k_proj", "blk.1.attn_k.weight", 2),
    ):
        key = f"base_model.model.model.layers.1.{module}.lora_"
        delta = plain[key + "B.weight"] @ plain[key + "A.weight"]
        if heads:  # row 2 j + i of a head is row i * half + j
            half = len(delta) // heads // 2
            rows = [
                h * 2 * half + i * half + j
                for h in range(heads)
                for j in range(half)
                for i in range(2)
            ]
            delta = delta[rows]
        assert torch.allclose(updates[name], delta, atol=1e-6), name


def test_router_goes_into_a_file_as_the_better_of_mean_and_fit(
    make_recipe: Make, tmp_path: Path
) -> None:
    run = train(make_recipe(method="hydralora"))
    update = Update(static=True, rows=8)
    done = export_gguf_lora(run, tmp_path / "loras", update)
    names = ["all_tasks.gguf", "colour.gguf", "copy.gguf", "parity.gguf"]
    assert [Path(one.path).name for one in done] == names
    assert all("it loses" in one.note for one in done if one.gap) and done[0].gap
    (model,) = export_gguf(run, tmp_path / "model", update)
    assert not model.exact and model.gap == done[0].gap
    merged = load_model(str(tmp_path / "model" / "model.gguf"))
    base = load_model(recipe_of(run).model)
    got = read_adapter(tmp_path / "loras" / "all_tasks.gguf")["blk.1.ffn_up.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    added = merged.state_dict()[name] - base.state_dict()[name]
    assert torch.allclose(added, got, atol=1e-5) and got.abs().max() > 1e-3


def test_wrong_order_of_rows_fails_and_leaves_nothing(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))
    monkeypatch.setattr(LlamaNames, "rows", lambda _self, _name, tensor: tensor)
    with pytest.raises(ExportError, match=r"model\.gguf, read back: logits differ"):
        export_gguf(run, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    right = gguf_write.write_adapter

    def unscaled(factors: gguf_write.Factors, *rest: object) -> None:
        right({name: (A, 2 * B) for name, (A, B) in factors.items()}, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("manylora.export.gguf_files.write_adapter", unscaled)
    with pytest.raises(ExportError, match=r"lora\.gguf, added to its base as GGUF: logits differ"):
        export_gguf_lora(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_other_models_are_refused_by_name_with_what_to_do() -> None:
    with pytest.raises(ExportError, match=r"'qwen2'.*convert_hf_to_gguf"):
        check_llama(type("Config", (), {"model_type": "qwen2"})())  # type: ignore[arg-type]
    for field, said in (
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ):
        with pytest.raises(ExportError, match=rf"{said}.*--to merged"):
            check_llama(tiny_llama(**field).config)
    check_llama(tiny_llama().config)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, "smollm"),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
    ],
)
def test_way_of_splitting_is_known_or_refused(steps: dict[str, object], name: str | None) -> None:
    saved = {"model": {"type": "BPE"}, "pre_tokenizer": steps, "normalizer": None}
    if name is not None:
        assert splitting(saved) == name
        return
    with pytest.raises(ExportError, match=r"tokenizer .* --to merged"):
        splitting(saved)


def test_tokenizer_that_reads_back_otherwise_is_refused(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(method="multilora"))
    (done,) = export_gguf(run, tmp_path / "right")
    assert "gave the same ids for 7 texts" in done.note
    kind = "manylora.export.gguf_tokenizer._kind"
    monkeypatch.setattr(kind, lambda *_: TokenType.NORMAL)  # special tokens are cut up
    with pytest.raises(ExportError, match=r"read back from GGUF gives 'a<\|user\|>b' the ids"):
        export_gguf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_merges_is_refused_and_leaves_nothing(
    make_recipe: Make, tmp_path: Path
) -> None:
    bare = str(save_tiny_model(tmp_path / "bare"))
    run = train(make_recipe(method="multilora").model_copy(update={"model": bare}))
    with pytest.raises(ExportError, match="without merges"):
        export_gguf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sentencepiece_is_refused() -> None:
    saved = {"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": None}
    with pytest.raises(ExportError, match="with byte fallback"):
        splitting({**saved, "normalizer": None})


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nI am small.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_known_chat_template_becomes_a_template_with_its_default_system(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = CHATML
    text, about = modelfile("model.gguf", None, tokenizer)
    assert text.startswith("FROM ./model.gguf\n") and "ADAPTER" not in text
    assert FORMATS[0].template in text and 'SYSTEM """I am small."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and "ChatML" in about
    with_bos = tokenizer.chat_template = "{{ '<s>' }}" + CHATML
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert modelfile("model.gguf", None, tokenizer)[0] == text and with_bos.startswith("{{")


def test_unknown_chat_template_is_said_and_none_is_written(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for template in (
        tokenizer.chat_template,
        CHATML.replace("\n{{", " {{"),
        None,
        "{{ raise_exception('no system') }}",
    ):
        tokenizer.chat_template = template
        text, about = modelfile("BASE.gguf", "copy.gguf", tokenizer)
        assert "ADAPTER ./copy.gguf\n" in text and 'TEMPLATE """' not in text
        assert "no TEMPLATE" in about
