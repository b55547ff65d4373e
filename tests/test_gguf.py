"""A GGUF file as base model: the same model as from a folder, unpacked once, or a clear refusal."""

from __future__ import annotations

import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from manylora.base import BaseModelError, cached, load_model, load_tokenizer, pinned, resolve
from manylora.base import gguf as gguf_base
from manylora.base.converted import known_sha256, sha256_of
from manylora.base.gguf import check_gguf, unpacked_folder
from tiny import tiny_llama
from tiny_gguf import FIELDS, after_storing, write_gguf

TOKENS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANYLORA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf")


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a conversion fails the test."""

    def convert(*_: Any) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(gguf_base, "convert", convert)


def folders(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.glob("gguf-*") if entry.is_dir())


def test_logits_are_those_of_the_same_weights_in_a_folder(whole: Path, tmp_path: Path) -> None:
    tiny_llama(**FIELDS).save_pretrained(tmp_path / "folder")
    from_folder = load_model(str(tmp_path / "folder"))
    from_gguf = load_model(str(whole))
    assert torch.equal(from_gguf(TOKENS).logits, from_folder(TOKENS).logits)
    assert not from_gguf.training
    assert load_model(str(whole), "bfloat16").dtype == torch.bfloat16


def test_quantised_file_is_dequantised(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    loaded = load_model(str(write_gguf(tmp_path / "q8.gguf", kind=kind)))
    weight = tiny_llama(**FIELDS).model.layers[0].mlp.up_proj.weight.detach()
    stored = torch.from_numpy(after_storing(weight.numpy(), kind))
    got = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(got, stored) and not torch.equal(got, weight)


@pytest.mark.parametrize(("quantize", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantize_works_on_what_was_unpacked(whole: Path, quantize: Any, layer: str) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load_model(str(whole), "float32", quantize)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == layer
    exact = load_model(str(whole))(TOKENS).logits
    assert 0 < float((loaded(TOKENS).logits - exact).detach().abs().mean()) < 0.2 * exact.std()


def test_tokenizer_and_chat_template_come_out_of_the_file(whole: Path) -> None:
    tokenizer = load_tokenizer(str(whole))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)
    assert pieces == ["he", "llo"]  # merged as the file says
    assert tokenizer.decode(tokenizer("hello, wörld").input_ids) == "hello, wörld"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hi<|end|>"


@pytest.mark.usefixtures("cache")
def test_a_copy_under_another_name_is_not_unpacked_again(
    whole: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = resolve(str(whole))
    request.getfixturevalue("no_conversion")
    shutil.copy(whole, tmp_path / "copy.bin")
    assert resolve(str(tmp_path / "copy.bin")) == first


def test_another_model_under_the_same_name_is_unpacked_for_itself(
    cache: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", seed=0)
    before = load_model(str(path))(TOKENS).logits
    write_gguf(path, seed=1)
    assert not torch.equal(load_model(str(path))(TOKENS).logits, before)
    assert len(folders(cache)) == 2


def test_the_checksum_of_an_unchanged_file_is_read_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(whole, tmp_path / "model.gguf"))
    digest = sha256_of(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert sha256_of(path) == digest
    with path.open("ab") as stream:
        stream.write(b"more")
    assert known_sha256(path) is None
    assert sha256_of(path) != digest


def test_half_unpacked_model_is_unpacked_again(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_path: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_base, "convert", killed)
        with pytest.raises(KeyboardInterrupt):
            resolve(str(whole))
    assert folders(cache) == [] and unpacked_folder(whole) is None
    folder = Path(resolve(str(whole)))
    assert unpacked_folder(whole) == folder
    (folder / "model.safetensors").write_bytes(b"torn")
    assert unpacked_folder(whole) is None
    assert load_model(str(whole))(TOKENS).logits.isfinite().all()


def test_large_models_are_unpacked_to_bfloat16(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_base, "FLOAT32_BELOW", 1000)
    from safetensors.torch import load_file

    tensors = load_file(Path(resolve(str(whole))) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_file_is_pinned_by_its_absolute_path(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    assert pinned("whole.gguf") == str(whole)
    assert cached("whole.gguf")
    assert not cached("other.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "nosuch"}, "architecture nosuch is not supported.*original model"),
        ({"leave_out": "blk.1.attn_q"}, "lacks 1 tensors.*layers.1.self_attn.q_proj"),
        ({"tokenizer": False}, "holds no tokenizer"),
        ({"extra": {"split.count": 3}}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"leave_out": ""}, "holds no model"),
    ],
)
def test_what_cannot_become_a_base_model_is_refused(
    tmp_path: Path, cache: Path, options: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(BaseModelError, match=f"(?s){message}") as caught:
        resolve(str(path))
    assert str(path) in str(caught.value)
    assert folders(cache) == []


@pytest.mark.parametrize("size", [10, 100, 5000, -1])
def test_truncated_file_is_refused_before_anything_is_written(
    whole: Path, tmp_path: Path, cache: Path, size: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(BaseModelError, match=r"truncated or damaged .* bytes"):
        resolve(str(path))
    assert not cache.exists()


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<html>not found</html>")
    with pytest.raises(BaseModelError, match="does not start with 'GGUF'"):
        resolve(str(page))
    other = tmp_path / "weights.bin"
    other.write_bytes(b"\x80\x02")
    with pytest.raises(BaseModelError, match="no GGUF file"):
        resolve(str(other))
    with pytest.raises(BaseModelError, match="GGUF file that exists"):
        resolve(str(tmp_path / "missing.gguf"))
    with pytest.raises(BaseModelError, match=r"give the file itself: .*page\.gguf"):
        resolve(str(tmp_path))


def test_full_disk_names_the_bytes_and_the_variable(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(BaseModelError, match=r"needs 0\.1 GB .* 0\.0 GB are free.*MANYLORA_CACHE"):
        resolve(str(whole))
    monkeypatch.undo()
    assert folders(cache) == []


def test_disk_that_fills_while_writing_leaves_nothing(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(BaseModelError, match=r"No space left on device.*Set MANYLORA_CACHE"):
        resolve(str(whole))
    assert folders(cache) == []


def test_damaged_headers_end_in_a_message_whatever_the_damage(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    header = content.index(b"output_norm.weight") + 100
    chance, path, refused = random.Random(0), tmp_path / "damaged.gguf", 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 4])):
            at = chance.randrange(4, header)
            damaged[at] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            check_gguf(path)
        except BaseModelError:
            refused += 1
    assert refused > 40
