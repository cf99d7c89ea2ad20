"""Small files that unpack to large ones, and large ones: refused in bounded time and memory."""

import gzip
import json

import pytest
import zstandard

from faults.hostile_inputs import check

RECIPE = """
extends: test-tiny
batch: {row_tokens: 2048}
data: {mixture: ./mixture.yaml, cache_dir: ./cache}
"""
LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
XML = {
    "entities": f'<!DOCTYPE x [<!ENTITY a0 "ha">{LAUGHS}]><collection>&a11;</collection>',
    "a file of the machine": '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    "<collection><schema><text><txt1>&a;</txt1></text></schema></collection>",
    "depth": "<a>" * 100_000,
}
PACKERS = {"gz": lambda data: gzip.compress(data, 1), "zst": zstandard.ZstdCompressor(1).compress}


@pytest.fixture
def prepare(glam, tmp_path, monkeypatch):
    """`glam data prepare` of one source that is this file."""
    monkeypatch.chdir(tmp_path)

    def prepare(name, content, **source):
        (tmp_path / name).write_bytes(content)
        mixture = {"sources": {"bomb": {"path": name, "weight": 1, **source}}}
        (tmp_path / "mixture.yaml").write_text(json.dumps(mixture))
        (tmp_path / "my.yaml").write_text(RECIPE)
        said = []

        def told(*arguments):
            code, out, err = glam(*arguments)
            said.append(err)
            return code, out, err

        code = check(told, ("data", "prepare", "./my.yaml"), name)
        return code, said[0]

    return prepare


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "jsonl"},
        {"kind": "text", "separator": "line"},
        {"kind": "text", "separator": "file"},
        {"kind": "text", "separator": "blank_line"},
    ],
)
@pytest.mark.parametrize("line", [b"0" * (1 << 21), b"0" * 9999 + b"\n"], ids=["a line", "lines"])
@pytest.mark.parametrize("packer", PACKERS)
def test_a_document_without_end_is_refused(prepare, monkeypatch, packer, line, source):
    is_long = len(line) > 1 << 20 or source.get("separator") in ("file", "blank_line")
    limit = 1 << 20
    for module in ("unpack", "sources"):
        monkeypatch.setattr(f"glamcli.data.{module}.MAX_DOCUMENT_BYTES", limit)
    content = PACKERS[packer](line * ((1 << 21) // len(line) or 1))
    code, err = prepare(f"bomb.{packer}", content, **source)
    if is_long:
        assert code == 3
        assert f"has more than {limit:,} bytes" in err
    else:
        assert code == (3 if source["kind"] == "jsonl" else 0), err


@pytest.mark.slow
def test_a_line_of_three_gigabytes_in_a_small_file_is_refused(prepare):
    packer = zstandard.ZstdCompressor(1).compressobj()
    content = b"".join(packer.compress(b"0" * (1 << 26)) for _ in range(48)) + packer.flush()
    assert len(content) < 1 << 20
    code, err = prepare("bomb.zst", content, kind="jsonl")
    assert code == 3
    assert "bomb.zst:1: the line has more than 536,870,912 bytes" in err


@pytest.mark.slow
def test_a_document_of_64_megabytes_takes_bounded_memory(prepare):
    words = b"some words of a document that does not end "
    code, err = prepare("long.txt", words * ((64 << 20) // len(words)), kind="text")
    assert code == 0, err


@pytest.mark.parametrize("kind", XML)
def test_xml_that_expands_is_refused(glam, tmp_path, kind):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "WSCollection.xml").write_text(XML[kind])
    place = ("--data-dir", tmp_path / "data", "--from", tmp_path / "given", "--offline")
    assert check(glam, ("eval", "data", "winograd", *place), kind) == 3
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "command", "code"),
    [
        ("huge.model", ("tokenizer", "show", "huge.model", "text"), 3),
        ("huge.json", ("eval", "show", "huge.json"), 3),
        ("huge.yaml", ("recipe", "show", "./huge.yaml"), 2),
        ("huge.yaml", ("eval", "data", "huge.yaml", "--offline"), 2),
        ("items.jsonl", ("eval", "data", "task.yaml", "--offline"), 3),
    ],
)
def test_a_file_of_many_gigabytes_is_refused_before_it_is_read(
    glam, tmp_path, monkeypatch, name, command, code
):
    monkeypatch.chdir(tmp_path)
    task = 'data: {path: items.jsonl}\nprompt: "{q}"\noptions: o\nlabel: right\n'
    (tmp_path / "task.yaml").write_text(task)
    with (tmp_path / name).open("wb") as file:
        file.truncate(64 << 30)  # takes no room on the disk
    assert check(glam, command, name) == code
