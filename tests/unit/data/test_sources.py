"""Documents come out of every kind of source in order, and bad input is named by file and line."""

import gzip
import json
import os
import tempfile

import numpy as np
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from glamcli.config.mixtures import Source, load_mixture
from glamcli.data.source_files import _base
from glamcli.data.sources import Reading, documents, files
from glamcli.errors import DataError


def source(kind, path, **settings) -> Source:
    return Source(kind=kind, path=str(path), weight=1, **settings)


def read(kind, path, **settings) -> list[str]:
    return list(documents(source(kind, path, **settings), "web"))


def jsonl(path, *records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_json_lines_are_read_plain_and_packed_in_sorted_order(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"text": "three"})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n'))
    packed = zstandard.compress(b'{"text": "two"}') + zstandard.compress(b'\n{"text": "and"}')
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "notes.md").write_text("not a document")
    assert read("jsonl", tmp_path) == ["one", "two", "and", "three"]
    assert read("jsonl", tmp_path / "b*") == ["three"]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("file", ["one\ntwo\n\n\n  three\r\n"]),
        ("line", ["one", "two", "  three"]),
        ("blank_line", ["one\ntwo", "  three"]),
    ],
)
def test_text_is_cut_at_its_separator(tmp_path, separator, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n\n  three\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    assert read("text", tmp_path, separator=separator) == expected


def test_empty_and_short_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("long enough\n\nno\nlong enough too\n")
    reading = Reading()
    kept = documents(
        source("text", tmp_path / "a.txt", separator="line", min_chars=3), "web", reading
    )
    assert list(kept) == ["long enough", "long enough too"]
    assert (reading.num_read, reading.num_empty, reading.num_short) == (4, 1, 1)


def test_where_keeps_documents_by_field_also_nested(tmp_path):
    jsonl(
        tmp_path / "a.jsonl",
        {"body": "one", "meta": {"lang": "en"}, "ok": True},
        {"body": "two", "meta": {"lang": "de"}, "ok": True},
        {"body": "three", "meta": {"lang": "en"}, "ok": 1},
    )
    where = {"meta.lang": "en", "ok": True}
    assert read("jsonl", tmp_path, field="body", where=where) == ["one"]
    assert read("jsonl", tmp_path, field="body", max_documents=2) == ["one", "two"]


def test_a_record_without_the_field_of_where_is_left_out_like_one_with_another_value(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two", "lang": "en"}, {"text": "three"})
    reading = Reading()
    kept = documents(source("jsonl", tmp_path, where={"lang": "en"}), "web", reading)
    assert list(kept) == ["two"]
    assert reading.counts()["num_unmatched"] == 2


def test_a_field_of_where_that_no_record_has_is_probably_misspelled(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "one", "lang": "en"}, {"text": "two"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field `langs`") as caught:
        read("jsonl", tmp_path, where={"langs": "en"})
    assert caught.value.hint == "did you mean `lang`?"
    assert read("jsonl", tmp_path, where={"lang": "de"}) == []


def test_bytes_that_are_no_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "b"}\n{"text": "\\ud800c"}\n')
    reading = Reading()
    texts = list(documents(source("jsonl", tmp_path), "web", reading))
    assert texts == ["a\ufffd", "b", "?c"]
    assert reading.num_replaced == 2


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ('{"text": ', "a.jsonl:2: not JSON: Expecting value (character ", None),
        ("[1]", "a.jsonl:2: expected a JSON object, found a list", None),
        ('{"texts": "x"}', "a.jsonl:2: no field `text`", "did you mean `texts`?"),
        ('{"text": [1]}', "a.jsonl:2: field `text` should be text, found a list", None),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, what, hint):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read("jsonl", tmp_path)
    assert what in caught.value.what
    assert hint is None or caught.value.hint == hint


def test_a_cut_off_archive_is_refused(tmp_path):
    content = "".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(2000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-500])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read to its end"):
        read("jsonl", tmp_path)


def test_no_match_names_source_and_pattern(tmp_path):
    with pytest.raises(DataError, match=r"source `web`: no file matches `.*\*\.jsonl`"):
        read("jsonl", tmp_path / "*.jsonl")


def test_hidden_files_and_folders_are_left_out_unless_the_path_names_them(tmp_path):
    folder = tmp_path / ".corpus"
    for name in ("a.jsonl", ".b.jsonl", "._a.jsonl", ".ipynb_checkpoints/c.jsonl", "x/d.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(folder / name, {"text": name})
    assert read("jsonl", folder) == ["a.jsonl", "x/d.jsonl"]
    assert read("jsonl", folder / "*.jsonl") == ["a.jsonl"]
    assert read("jsonl", folder / "**/*.jsonl") == ["a.jsonl", "x/d.jsonl"]
    assert read("jsonl", folder / ".b*") == [".b.jsonl"]
    assert read("jsonl", folder / "._a.jsonl") == ["._a.jsonl"]
    assert read("jsonl", folder / ".ipynb_checkpoints") == [".ipynb_checkpoints/c.jsonl"]
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match="2 hidden ones are left out"):
        read("jsonl", folder / "*.jsonl")


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path):
    for name in ("data [v1]/a.jsonl", "data v/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        jsonl(tmp_path / name, {"text": name})
    assert read("jsonl", tmp_path / "data [v1]/*.jsonl") == ["data [v1]/a.jsonl"]
    assert read("jsonl", tmp_path / "data [v1]") == ["data [v1]/a.jsonl"]
    assert read("jsonl", tmp_path / "data [uv]/*.jsonl") == ["data v/b.jsonl"]


@pytest.mark.parametrize(
    ("names", "what", "hint"),
    [
        (["a.json.gz", "b.JSON.gz", "c.md"], "it has 2 `.json.gz`, 1 `.md`", "/*.json.gz` reads"),
        (["a.parquet"], "it has 1 `.parquet`", "read_parquet"),
        (["a.txt"], "it has 1 `.txt`", "`kind: text`"),
    ],
)
def test_a_folder_without_files_of_the_kind_says_what_it_has(tmp_path, names, what, hint):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read("jsonl", tmp_path)
    assert what in caught.value.what
    assert hint in (caught.value.hint or "")


def test_a_file_listed_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    with pytest.raises(DataError, match="the same file is listed twice"):
        files(source("text", tmp_path), "web")


@pytest.mark.parametrize("path", ["a.txt", "*.txt", "data", "data/*", "[ab].txt"])
def test_brackets_in_the_name_of_the_folder_of_a_mixture_mean_nothing(tmp_path, path):
    folder = tmp_path / "[old] runs*"
    (folder / "data").mkdir(parents=True)
    for place in ("a.txt", "data/a.txt"):
        (folder / place).write_text("one")
    (folder / "m.yaml").write_text(f"sources: {{web: {{kind: text, path: '{path}', weight: 1}}}}")
    mixture = load_mixture(folder / "m.yaml")
    assert list(documents(mixture.sources["web"], "web")) == ["one"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:CANARY@127.0.0.1:9/a.jsonl",
        "memory://user:CANARY@h/*.jsonl",
        "memory://bucket/a.jsonl?sig=CANARY/x&key=CANARY",
        "https://user:p@CANARY@127.0.0.1:9/a.jsonl?CANARY",
    ],
)
def test_credentials_in_a_url_are_in_no_message(url):
    with pytest.raises(DataError) as caught:
        read("jsonl", url)
    assert "://" in caught.value.what
    assert "CANARY" not in f"{caught.value} {caught.value.what} {caught.value.hint}"


def test_a_signature_is_no_part_of_a_file_s_name():
    assert _base("https://h/a/b.jsonl.gz?sig=x/y") == "b.jsonl.gz"
    assert _base("/data/what?.jsonl") == "what?.jsonl"


def test_an_unknown_embedded_part_is_told_with_its_source():
    with pytest.raises(DataError, match="source `web`: no embedded text is called `novels`"):
        files(source("embedded", "novels"), "web")


def test_remote_paths_are_read_by_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.txt", b"two")
    memory.pipe("/corpus/a.txt", b"one")
    assert read("text", "memory://corpus/*.txt") == ["one", "two"]


def test_a_package_that_a_remote_path_needs_is_told_with_its_extra(monkeypatch):
    def url_to_fs(url):
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(DataError, match="requires aiohttp") as caught:
        read("text", "https://127.0.0.1:9/a.txt")
    assert caught.value.hint == "pip install 'glamcli[remote]'"


@pytest.mark.parametrize("as_json", [True, False])
def test_array_records_hold_json_objects_or_text(tmp_path, as_json):
    texts = ["one", "{two", "drei \u00e4"]
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for text in texts:
        writer.write((json.dumps({"text": text}) if as_json else text).encode())
    writer.close()
    assert read("array_record", tmp_path) == texts


def test_a_damaged_array_record_is_named(tmp_path):
    (tmp_path / "a.array_record").write_bytes(os.urandom(5000))
    with pytest.raises(DataError, match=r"a\.array_record: damaged"):
        read("array_record", tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_array_record_is_named(tmp_path, share):
    path = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for number in range(200):
        writer.write(f"text {number}".encode() * 50)
    writer.close()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"a\.array_record: damaged"):
        read("array_record", tmp_path)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        # TFDS leaves a folder behind for every builder.
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("left")))
        yield _prepared_tfds(tfds, folder)


def _prepared_tfds(tfds, folder):

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "label": np.int64}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                yield i, {"text": f"text {i}", "label": i % 2}

    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_prepared_tfds_folders_are_read_by_split_and_filter(tfds_folder):
    assert read("tfds", tfds_folder, split="train[:3]") == ["text 0", "text 1", "text 2"]
    assert read("tfds", tfds_folder, split="test", where={"label": 1})[:2] == ["text 1", "text 3"]
    with pytest.raises(DataError, match="name a `split` of `test`, `train`"):
        read("tfds", tfds_folder)
    with pytest.raises(DataError, match="no field `body`"):
        read("tfds", tfds_folder, split="train", field="body")
    with pytest.raises(DataError, match="no split `dev`"):
        read("tfds", tfds_folder, split="dev")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="cannot be read as a prepared TFDS folder"):
        read("tfds", tmp_path, split="train")
