"""Files of rows: what each format gives, which files are tasks, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuzz_check import peak_memory
from manylora.corpus import streams
from manylora.corpus.layouts import CorpusError, Example, Fields
from manylora.corpus.readers import columns_not_read, read_examples

ROWS = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(5)]


def good(path: Path, **fields: str) -> list[Example]:
    """The examples of a file without bad rows."""
    found = list(read_examples(path, Fields(**fields)))
    assert all(isinstance(item, Example) for item in found), found
    return found  # type: ignore[return-value]


def errors(path: Path) -> list[str]:
    """The bad rows, and at the end why the file was read no further."""
    found = []
    try:
        found += [str(item) for item in read_examples(path) if isinstance(item, CorpusError)]
    except CorpusError as error:
        found.append(str(error))
    return found


def refusal(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        list(read_examples(path))
    return str(caught.value)


def csv_of(delimiter: str) -> str:
    lines = [["instruction", "input", "output"], *(list(row.values()) for row in ROWS)]
    return "".join(delimiter.join(line) + "\r\n" for line in lines)


def write_parquet(path: Path, columns: dict[str, object]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def write_every_format(folder: Path) -> list[Path]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    texts = {
        "a.jsonl": lines,
        "b.ndjson": "\ufeff\n" + lines.replace("\n", "\r\n\n"),
        "c.json": json.dumps(ROWS),
        "d.json": json.dumps({"version": 1, "tags": ["x"], "data": ROWS, "n": 5}, indent=2),
        "e.json": lines,
        "f.csv": csv_of(","),
        "g.csv": csv_of(";"),
        "h.tsv": "\ufeff" + csv_of("\t"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
        packed = gzip.compress(text.encode())
        (folder / f"{name}.gz").write_bytes(packed)
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    write_parquet(folder / "i.parquet", columns)
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    files = write_every_format(tmp_path)
    assert len(files) == 17
    for file in files:
        assert [item.output for item in good(file)] == ["a0", "a1", "a2", "a3", "a4"], file
        assert good(file)[0].task == file.name[0]


def test_the_source_of_a_row_is_its_line_or_number(tmp_path: Path) -> None:
    write_every_format(tmp_path)
    places = {"a.jsonl": "5", "b.ndjson": "10", "c.json": "1 (row 5)", "d.json": "27 (row 5)"}
    places |= {"f.csv": "6", "i.parquet": "5", "a.jsonl.gz": "5"}
    for name, place in places.items():
        assert good(tmp_path / name)[-1].source == f"{name}:{place}"


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    text = ' a\u2028b \\ "c",\r\n;\t\u00e9\U0001f600 '
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text, "output": text}))
    line = '{"prompt": " a\u2028b ", "output": "\\u00e9\\n"}'
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    quoted = '"' + text.replace('"', '""') + '"'
    (tmp_path / "c.csv").write_text(
        f"prompt,output\n{quoted},{quoted}\n", encoding="utf-8", newline=""
    )
    write_parquet(tmp_path / "d.parquet", {"prompt": [text], "output": [text]})
    for name in ("a.jsonl", "c.csv", "d.parquet"):
        (only,) = good(tmp_path / name)
        assert only.prompt[0]["content"] == only.output == text
    (only,) = good(tmp_path / "b.jsonl")
    assert (only.prompt[0]["content"], only.output) == (" a\u2028b ", "\u00e9\n")


BAD_LINES = {
    b"{oops": "not JSON",
    b"[1, 2]": "a JSON list, not an object",
    b"3": "a JSON number, not an object",
    b"{}": "the row has no field",
    b'{"instruction": "a", "text": "b"}': "the row has 'instruction', 'text'",
    b'{"instruction": "a", "output": ""}': 'field "output" is empty',
    b'{"instruction": "a", "input": null, "output": "b"}': "in quotes or leave it out",
    b'{"instruction": "a", "output": "\\ud800"}': "half of a surrogate pair",
    b'{"instruction": "caf\xe9", "output": "b"}': "not UTF-8 text: byte 0xe9 at position 20",
    b'{"instruction": "a", "output": "b", "output": "c"}': "the key 'output' is there twice",
    b'{"instruction": "a", "output": "b"} {': "text after the end of the row",
    b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}": "more than 4,300 digits",
    b"[" * 100_000: "nested too deep",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_one_bad_row_and_the_others_are_read(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "t.jsonl"
    row = b'{"instruction": "a", "output": "b"}\n'
    file.write_bytes(row + line + b"\n" + row)
    first, second, third = read_examples(file)
    assert isinstance(first, Example) and isinstance(third, Example)
    assert isinstance(second, CorpusError)
    assert str(second).startswith(f"{file}:2: ") and BAD_LINES[line] in str(second)


BROKEN_JSON = {
    '[{"prompt": "a"\n "output": "b"}]': ":2: not JSON: Expecting ',' delimiter",
    '[{"prompt": "a", "output": "b"}\n': ":2: not JSON: found the end of the file where , or ]",
    '[{"prompt": "a", "output": "b"}]\n[]': ":2: text after the end of the JSON",
    '[\n{"prompt": "a", "output": "b"},]': ":2: not JSON: Expecting value",
    '"a"': ":1: a JSON file begins with [ or {",
    "[]": ": holds no row",
    '{"a": 1, "b": ["x"]}': "with 'a', 'b', and none of it a list of objects",
    '{"messages": [{"role": "user", "content": "q"}]}': "is one conversation, so this is one row",
    '{"a": [{"prompt": "q", "output": "a"}], "b": [{}]}': "two lists of objects, 'a' and 'b'",
}


@pytest.mark.parametrize("text", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
def test_broken_json_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(text)
    assert refusal(file).startswith(str(file)) and BROKEN_JSON[text] in refusal(file)


def test_a_json_list_may_hold_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('[{"prompt": "a", "output": "b"},\n 3,\n {"prompt": "a", "output": ""}]')
    assert [error[len(str(file)) :][:20] for error in errors(file)] == [
        ":2 (row 2): a JSON n",
        ':3 (row 3): field "o',
    ]


def test_a_row_may_lie_across_many_blocks_of_a_json_file(tmp_path: Path) -> None:
    long = "\u00e9\\" * 600_000
    file = tmp_path / "t.json"
    rows = [{"prompt": "a", "output": long}, {"prompt": "b", "output": "c"}]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [item.output for item in good(file)] == [long, "c"]
    file.write_bytes(b'[\n{"prompt": "' + b"a" * 300_000 + b'\xe9"}]')
    assert "t.json:2: not UTF-8 text: byte 0xe9" in refusal(file)


def test_rows_of_a_csv_file_must_fit_its_header(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(
        b'prompt,output,id\na,b,1\na,b\n\na,"b\nc",1,2\ncaf\xe9,b,1\n,b,1\n"x\ny",z,1\n'
    )
    found = list(read_examples(file))
    assert [isinstance(item, Example) for item in found] == [True, False, False, False, False, True]
    assert [str(item)[len(str(file)) :].split(".")[0] for item in found[1:5]] == [
        ":3: 2 fields, where the header in line 1 has 3",
        ":5: 4 fields, where the header in line 1 has 3",
        ":7: not UTF-8 text: byte 0xe9 at position 3 of the line",
        ':8: field "prompt" is empty',
    ]
    assert found[5].source == "t.csv:9"  # type: ignore[union-attr]


BROKEN_CSV = {
    b'prompt,output\na,"b': ":2: not CSV: unexpected end of data",
    b'prompt,output\na,"b"c\n': ":2: not CSV",
    b"prompt,output,output\na,b,c": "names 'output' twice",
    b"text,label\na,b": "the row has 'text', 'label'",
    b"question,A,B,answer\nq,a,b,A": "look like the choices",
    "prompt,output\n".encode("utf-16-le"): "looks like UTF-16 text",
    "prompt,output\n".encode("utf-16"): "it is UTF-16 text. Save it as UTF-8",
    b"prompt,output\n": "holds no row",
    b"": "holds no row",
    b"PK\x03\x04": "a zip or Excel file",
}


@pytest.mark.parametrize("content", BROKEN_CSV, ids=range(len(BROKEN_CSV)))
def test_a_broken_csv_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    assert refusal(file).startswith(str(file)) and BROKEN_CSV[content] in refusal(file)


def test_parquet_holds_conversations_and_nulls(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file = write_parquet(tmp_path / "t.parquet", {"messages": [chat, None, chat], "id": [1, 2, 3]})
    first, second, third = read_examples(file)
    assert isinstance(first, Example) and first.messages == chat and isinstance(third, Example)
    assert str(second).startswith(f"{file}:2: ") and "is null, not a list" in str(second)
    assert columns_not_read(file) == ["id"]


def test_parquet_text_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff", b"ok"], pa.binary()).view(pa.utf8())
    file = write_parquet(tmp_path / "t.parquet", {"prompt": broken, "output": ["a"] * 3})
    assert errors(file) == [f"{file}:2: text that is not UTF-8. Write the column anew."]
    file = write_parquet(tmp_path / "n.parquet", {"prompt": ["a"], "output": [3]})
    assert "is 3, not a string. Store the column as text" in errors(file)[0]


def test_files_that_are_not_what_their_suffix_says_are_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"prompt": "a", "output": "b"}\n' * 1000)
    wrong = {
        "cut.jsonl.gz": (packed[:-20], "cut off"),
        "plain.jsonl.gz": (b"{}", "not a whole gzip file"),
        "packed.jsonl": (packed, "give it the suffix .gz"),
        "not.parquet": (b"prompt,output\na,b\n", "not a Parquet file"),
        "rows.txt": (b"a", "the suffix '.txt' is not known"),
    }
    for name, (content, expected) in wrong.items():
        (tmp_path / name).write_bytes(content)
        assert expected.lower() in refusal(tmp_path / name).lower()
    assert "no such file" in refusal(tmp_path / "nowhere.jsonl")
    assert "no such file" in refusal(tmp_path)


def test_a_line_too_long_to_be_a_row_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 2**28, 1))
    before = peak_memory(reset=True)
    assert "bomb.jsonl.gz:1: the line is longer than 16 MiB" in refusal(bomb)
    assert peak_memory() - before < 80 * 2**20
    monkeypatch.setattr("manylora.corpus.tabular.LONGEST", 100)
    table = tmp_path / "t.csv"
    table.write_text('prompt,output\na,"' + "b\n" * 100)
    assert "t.csv:2: the row that begins there is longer" in refusal(table)
    assert streams.LONGEST == 2**24


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    row = {"prompt": "a" * 1000, "output": "b" * 1000}
    file = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        columns = {key: [value] * 2000 for key, value in row.items()}
        with pq.ParquetWriter(file, pa.table(columns).schema, use_dictionary=False) as writer:
            for _ in range(20):
                writer.write_table(pa.table(columns))
    else:
        with file.open("w") as out:
            out.write({"jsonl": "", "json": "[", "csv": "prompt,output\n"}[suffix])
            for number in range(40_000):
                comma = ",\n" if suffix == "json" and number else ""
                text = ",".join(row.values()) if suffix == "csv" else json.dumps(row)
                out.write(comma + text + ("" if suffix == "json" else "\n"))
            out.write("]" if suffix == "json" else "")
    for _ in zip(read_examples(file), range(100), strict=False):
        pass
    before = peak_memory(reset=True)
    assert sum(isinstance(item, Example) for item in read_examples(file)) == 40_000
    assert peak_memory() - before < 25 * 2**20


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    row = {"prompt": "a", "output": "b", "topic": "x", "id": 1}
    file.write_text(json.dumps({"version": 1, "rows": [row, {**row, "note": "late"}]}))
    assert columns_not_read(file) == ["id", "note", "topic", "version"]
    assert columns_not_read(file, Fields(task="topic")) == ["id", "note", "version"]
