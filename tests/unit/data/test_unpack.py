"""Files are read by what they hold: whole or not at all, and never as another kind of text."""

import bz2
import gzip
import json
import lzma
import random
import zipfile

import pytest
import zstandard

from glamcli.config.mixtures import Source
from glamcli.data.sources import documents, source_inputs
from glamcli.errors import DataError

RANDOM = random.Random(0)
LINES = [json.dumps({"text": f"{i} {RANDOM.random()}"}) for i in range(4000)]
CONTENT = "\n".join(LINES).encode()


def read(path, kind="jsonl", **settings) -> list[str]:
    source = Source(kind=kind, path=str(path), weight=1, **settings)
    source_inputs(source, "web")
    return list(documents(source, "web"))


def zstd(data: bytes, **settings) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, **settings)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("pack", [zstd, gzip.compress])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_file_that_was_cut_short_is_refused_with_what_to_do(tmp_path, pack, share, as_text):
    data = pack(CONTENT)
    path = tmp_path / ("a.gz" if pack is gzip.compress else "a.zst")
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read to its end: ") as caught:
        read(path, "text" if as_text else "jsonl", separator="line")
    assert "cut short" in (caught.value.hint or "")


def test_every_frame_of_a_file_is_read_and_the_last_one_must_be_whole(tmp_path):
    half = len(LINES) // 2
    frames = [zstd(("\n".join(part) + "\n").encode()) for part in (LINES[:half], LINES[half:])]
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + frames[0] + skippable + frames[1])
    assert len(read(path)) == len(LINES)
    for cut in (1, len(frames[1]) // 2, len(frames[1]) - 3):
        path.write_bytes(frames[0] + frames[1][:-cut])
        with pytest.raises(DataError, match="in the middle of a frame"):
            read(path)


def test_a_window_of_any_size_is_unpacked(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(CONTENT, window_log=31))
    assert len(read(tmp_path)) == len(LINES)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.GZ"])
def test_an_empty_part_that_should_be_packed_is_refused(tmp_path, name):
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: is empty"):
        read(tmp_path)


def test_a_line_in_which_a_file_ends_is_not_blamed_on_its_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(CONTENT[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl:4000: the file ends in the middle of this line"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["A.TXT", "a.txt.GZ", "a.txt.Zst", "a.txt"])
@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_packed_files_are_recognised_by_content_under_any_name(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"one"))
    assert read(tmp_path, "text") == ["one"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"one")
    with pytest.raises(DataError, match="though its name says so"):
        read(tmp_path, "text")


def _zipped(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "one")


FOREIGN = {
    "UTF-16 text": "one\ntwo\n".encode("utf-16"),
    "UTF-16 text ": "one, two and three".encode("utf-16le"),
    "UTF-16 text  ": "one, two and three".encode("utf-16be"),
    "UTF-32 text": "one".encode("utf-32"),
    "packed with bzip2": bz2.compress(b"one"),
    "packed with xz": lzma.compress(b"one"),
    "a Parquet table": b"PAR1\x15\x04\x15\x80" + bytes(100) + b"PAR1",
    "a PDF document": b"%PDF-1.7\n",
    "a tar archive": bytes(257) + b"ustar\x0000" + bytes(247),
    "a zip archive": None,
}


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_utf8_text_is_refused_with_what_to_do(tmp_path, what, kind):
    path = tmp_path / "a.txt"
    data = FOREIGN[what]
    _zipped(path) if data is None else path.write_bytes(data)
    with pytest.raises(DataError, match=f"a.txt: is {what.strip()}, ") as caught:
        read(path, kind)
    assert caught.value.hint
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=f"a.txt: is {what.strip()}, "):
        read(path, kind)


@pytest.mark.parametrize(
    "text", ["", "BZh is how it begins", "PAR1 is a gene", "\ufeffone", "\x1b[1m", "\u4e00" * 300]
)
def test_text_that_only_begins_like_something_else_is_read(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path, "text") == [text.removeprefix("\ufeff")] * bool(text)


def test_rows_of_zstandard_files_are_made_anew_and_others_stay_valid(tmp_path):
    def inputs(name: str, data: bytes) -> dict:
        (tmp_path / name).write_bytes(data)
        source = Source(kind="jsonl", path=str(tmp_path / name), weight=1)
        return source_inputs(source, "web")

    assert set(inputs("a.jsonl", CONTENT)) == {"source", "part", "files"}
    assert set(inputs("a.jsonl.gz", gzip.compress(CONTENT))) == {"source", "part", "files"}
    assert inputs("a.jsonl.zst", zstd(CONTENT))["unpacking"] == 2
    assert inputs("b.jsonl", zstd(CONTENT))["unpacking"] == 2
