"""Prepared rows: the same bytes however they are made, found again, and never silently wrong."""

import hashlib
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glamcli.config.mixtures import Mixture, Source
from glamcli.config.schema import Batch, Data, Model, Recipe, Train
from glamcli.data import parts, source_files
from glamcli.data import prepare as preparing
from glamcli.data.pack import pack
from glamcli.data.prepare import prepare
from glamcli.data.prepared import Prepared
from glamcli.data.rows import META_FILE, Rows, write_rows_meta
from glamcli.data.tokenizer import Bytes
from glamcli.errors import DataError
from glamcli.progress import Silent

ROW_TOKENS = 64


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self):
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def recipe(packing="fill", processes=1) -> Recipe:
    return Recipe(
        model=Model(num_layers=2, model_dim=8, ffn_dim=8, num_heads=1, head_dim=8, vocab_size=512),
        batch=Batch(rows=2, row_tokens=ROW_TOKENS),
        train=Train(steps=1),
        data=Data(mixture="unused", packing=packing, prepare_processes=processes),
    )


def mixture(folder: Path, **settings) -> Mixture:
    web = Source(kind="jsonl", path=str(folder), weight=1, **settings)
    return Mixture(sources={"web": web}, heldout_frac=0.1)


def write_corpus(folder: Path, num_documents=300) -> list[str]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    texts = [f"document {i} " + "x" * int(rng.integers(0, 200)) for i in range(num_documents)]
    for name, part in (("a", texts[: num_documents // 2]), ("b", texts[num_documents // 2 :])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return texts


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_CHARS", 2000)
    monkeypatch.setattr(parts, "PARTS_WANTED", 10**9)
    monkeypatch.setattr(preparing, "WORTH_PROCESSES_BYTES", 0)


def texts_of(rows: Rows) -> list[str]:
    """The documents in rows that were filled in order."""
    read = [rows[index] for index in range(len(rows))]
    targets = np.concatenate([row["targets"][row["segments"] > 0] for row in read])
    ends = np.flatnonzero(targets == 1)
    return [Bytes().decode(part.tolist()) for part in np.split(targets, ends + 1)[:-1]]


def content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_every_document_is_in_training_or_held_out_once(corpus, tmp_path):
    texts = write_corpus(corpus)
    prepared = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    train, heldout = texts_of(prepared.train["web"]), texts_of(prepared.heldout["web"])
    assert sorted(train + heldout) == sorted(texts)
    assert len(heldout) > 10
    assert prepared.heldout_documents("web") == heldout
    counts = prepared.train["web"].counts
    assert counts.num_documents == len(train)
    assert counts.num_tokens == sum(len(text) + 1 for text in train)
    assert prepared.train["web"].utilisation == counts.num_tokens / (
        ROW_TOKENS * len(prepared.train["web"])
    )
    assert counts.max_id == max(Bytes().encode("".join(train)))


@pytest.mark.parametrize("packing", ["fill", "whole"])
def test_bytes_on_disk_do_not_depend_on_the_number_of_processes(
    corpus, tmp_path, small_parts, packing
):
    made = []
    for processes in (1, 2, 4) if packing == "fill" else (1, 2):
        cache = tmp_path / f"cache{processes}"
        prepare(recipe(packing, processes), mixture(corpus), Bytes(), cache, Silent())
        made.append(content(cache))
    assert all(other == made[0] for other in made[1:])
    assert len([name for name in made[0] if "train.array_record" in name]) > 5


def test_tfds_opens_what_was_prepared(corpus, tmp_path, small_parts):
    import tensorflow_datasets as tfds

    prepared = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    for split, rows in (("train", prepared.train["web"]), ("heldout", prepared.heldout["web"])):
        examples = tfds.builder_from_directory(rows.folder).as_data_source(split)
        assert len(examples) == len(rows)
        for index in (0, len(rows) // 2, len(rows) - 1):
            for name, array in rows[index].items():
                assert examples[index][name].dtype == array.dtype == np.int32
                np.testing.assert_array_equal(examples[index][name], array)


def test_a_second_run_reads_what_the_first_prepared(corpus, tmp_path, monkeypatch):
    first = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    monkeypatch.setattr(preparing, "documents", None)  # would fail if it were called
    again = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    assert again.fingerprints == first.fingerprints


@pytest.mark.parametrize("change", ["append", "replace", "same_size", "new_file"])
def test_a_changed_source_is_prepared_anew_and_says_why(corpus, tmp_path, change):
    before = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    path = corpus / ("c.jsonl" if change == "new_file" else "b.jsonl")
    text = path.read_text() if path.exists() else ""
    path.write_text(
        {
            "append": text + '{"text": "more"}\n',
            "replace": '{"text": "one"}\n{"text": "two"}\n',
            "same_size": text.replace("document", "DOCUMENT", 1),
            "new_file": '{"text": "more"}\n',
        }[change]
    )
    heard = Heard()
    after = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", heard)
    assert after.fingerprints != before.fingerprints
    assert heard.said[0] == f"source `web` has changed (`{path.name}`) and is prepared again"


def test_another_source_of_the_same_name_has_not_changed(corpus, tmp_path):
    prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    other = shutil.copytree(corpus, tmp_path / "other project")
    (other / "a.jsonl").write_text('{"text": "another corpus"}\n')
    heard = Heard()
    prepare(recipe(), mixture(other), Bytes(), tmp_path / "cache", heard)
    assert not any("changed" in text for text in heard.said)


def test_settings_that_change_rows_change_the_fingerprint(corpus, tmp_path):
    def fingerprint(made: Recipe, mixed: Mixture) -> str:
        return prepare(made, mixed, Bytes(), tmp_path / "cache", Silent()).fingerprints["web"]

    fingerprints = [
        fingerprint(recipe(), mixture(corpus)),
        fingerprint(recipe("whole"), mixture(corpus)),
        fingerprint(recipe(), mixture(corpus, min_chars=20)),
        fingerprint(recipe(), mixture(corpus).model_copy(update={"heldout_frac": 0.2})),
    ]
    assert len(set(fingerprints)) == 4
    moved = shutil.move(corpus, tmp_path / "elsewhere")
    assert fingerprint(recipe(), mixture(Path(moved))) == fingerprints[0]


def test_rows_of_one_tokenizer_are_never_those_of_another(corpus, tmp_path):
    class Other(Bytes):
        fingerprint = "another"

    def folder(tokenizer) -> Path:
        made = prepare(recipe(), mixture(corpus), tokenizer, tmp_path / "cache", Silent())
        return made.train["web"].folder

    assert folder(Bytes()) != folder(Other())


def test_an_interrupted_preparation_keeps_its_finished_parts(
    corpus, tmp_path, small_parts, monkeypatch
):
    expected = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "whole", Silent())
    made = []

    def counted(tokenizer, packing, row_tokens, folder, documents, stop_after=0):
        if stop_after and len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(folder.name)
        make_part(tokenizer, packing, row_tokens, folder, documents)

    make_part = parts.make_part
    monkeypatch.setattr(preparing, "make_part", lambda *args: counted(*args, stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    building = next((tmp_path / "cache" / "rows").glob(".*.parts"))
    (building / "00002" / "train").write_bytes(b"")  # torn: has to be made again
    monkeypatch.setattr(preparing, "make_part", counted)
    prepared = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    assert made[4] == "00002"
    assert made[5] == "00004"
    assert content(prepared.train["web"].folder) == content(expected.train["web"].folder)
    assert not list((tmp_path / "cache" / "rows").glob(".*.parts"))


def test_preparing_twice_at_once_gives_the_same_whole_folder(corpus, tmp_path, small_parts):
    def run(_: int) -> Prepared:
        return prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(run, range(4)))
    for prepared in made:
        assert not list(prepared.damage("web", 512))
    assert len([path for path in (tmp_path / "cache" / "rows").iterdir() if path.is_dir()]) == 1


class Deadly(Bytes):
    """Ends the process that uses it, as the kernel does when memory runs out."""

    def encode_chunks(self, text):
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_chunks(text)


def test_a_worker_that_dies_is_an_error_with_advice(corpus, tmp_path, small_parts):
    with pytest.raises(DataError) as caught:
        prepare(recipe(processes=2), mixture(corpus), Deadly(), tmp_path / "cache", Silent())
    assert "ended unexpectedly" in caught.value.what
    assert "finished parts are kept" in str(caught.value.hint)


def test_a_file_that_is_changed_while_it_is_read_is_refused_and_read_again(
    corpus, tmp_path, monkeypatch
):
    path = next(corpus.iterdir())

    def cut_and_write(documents, limit):
        yield from parts.cut(documents, limit)
        with path.open("a") as file:
            file.write(json.dumps({"text": "one more document"}) + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "cut", cut_and_write)
        with pytest.raises(DataError, match="its files were changed while they were read"):
            prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    assert not list((tmp_path / "cache" / "rows").glob("*/rows.json"))
    assert not list((tmp_path / "cache" / "rows").glob(".*.parts"))
    prepared = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    assert prepared.train["web"].counts.num_documents


def test_a_source_without_documents_says_where_they_went(corpus, tmp_path):
    with pytest.raises(DataError) as caught:
        prepare(recipe(), mixture(corpus, min_chars=999), Bytes(), tmp_path / "cache", Silent())
    assert caught.value.what.startswith("source `web`: no documents (300 read, 0 empty, 300 short")


def test_one_document_is_trained_on_and_two_are_shared_out(tmp_path):
    for number, expected in ((1, (1, 0)), (2, (1, 1))):
        folder = tmp_path / str(number)
        write_corpus(folder, number)
        prepared = prepare(recipe(), mixture(folder), Bytes(), tmp_path / "cache", Silent())
        rows = (prepared.train["web"], prepared.heldout["web"])
        assert tuple(part.counts.num_documents for part in rows) == expected
        assert not list(prepared.damage("web", 512))


def test_text_that_the_tokenizer_changes_is_counted_per_source(corpus, tmp_path):
    class Lossy(Bytes):
        """Folds the letter x to a space and does not know `0`."""

        fingerprint = "lossy"
        keeps_text = False
        unk_id = 258

        def encode_chunks(self, text):
            ids = np.array(self.encode(text.replace("x", " ")), np.int32)
            yield np.where(ids == 3 + ord("0"), self.unk_id, ids)

    texts = write_corpus(corpus)
    heard = Heard()
    prepared = prepare(recipe(), mixture(corpus), Lossy(), tmp_path / "cache", heard)
    counts = [prepared.train["web"].counts, prepared.heldout["web"].counts]
    num_changed = sum("x" in text or "0" in text for text in texts)
    num_unknown = sum(text.count("0") for text in texts)
    assert sum(each.num_changed for each in counts) == num_changed
    assert sum(each.num_unknown for each in counts) == num_unknown
    assert heard.warned == [
        f"source `web`: the tokenizer changes the text of {num_changed} of 300 documents; "
        f"{num_unknown} of its tokens stand for unknown text"
    ]


@pytest.mark.parametrize(("sizes", "warns"), [([99, 99, 99, 60, 60], True), ([3] * 200, False)])
def test_a_large_share_of_a_source_held_out_is_warned_of(tmp_path, sizes, warns):
    folder = tmp_path / "books"
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:03}.txt").write_text(f"book {number} " * size)
    books = Source(kind="text", path=str(folder), weight=1)
    heard = Heard()
    shelf = Mixture(sources={"books": books}, heldout_frac=0.01)
    prepare(recipe(), shelf, Bytes(), tmp_path / "cache", heard)
    assert (
        any("1 of 5 documents, which are held out whole" in text for text in heard.warned) == warns
    )


def test_copies_of_a_file_are_warned_of(corpus, tmp_path):
    shutil.copy(corpus / "a.jsonl", corpus / "c.jsonl")
    heard = Heard()
    prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", heard)
    assert heard.warned == ["source `web`: `a.jsonl` and `c.jsonl` have the same content"]


def test_sources_that_read_the_same_files_the_same_way_are_warned_of(corpus, tmp_path):
    web = mixture(corpus).sources["web"]
    copy = shutil.copytree(corpus, tmp_path / "copy")
    other = web.model_copy(update={"path": str(copy), "weight": 2.0})
    longer = web.model_copy(update={"min_chars": 20})  # another choice of the same documents
    both = Mixture(sources={"web": web, "other": other, "longer": longer})
    heard = Heard()
    prepare(recipe(), both, Bytes(), tmp_path / "cache", heard)
    assert heard.warned == ["sources `web` and `other` have the same content (`a.jsonl`)"]


def test_a_file_that_was_only_touched_leaves_the_identity_of_its_rows(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(source_files, "HASHED_WHOLE_BYTES", 0)
    monkeypatch.setattr(source_files, "SAMPLE_BYTES", 64)
    before = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    for path in corpus.iterdir():
        os.utime(path, (1, 1))
    after = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    assert after.train["web"].folder != before.train["web"].folder, "it was looked at again"
    assert after.fingerprints == before.fingerprints


def test_a_document_held_out_of_one_source_is_in_no_other_s_training_rows(corpus, tmp_path):
    texts = write_corpus(corpus)
    tiny = tmp_path / "tiny.jsonl"
    tiny.write_text("".join(json.dumps({"text": text + " \n"}) + "\n" for text in texts[:3]))
    sources = {"web": mixture(corpus).sources["web"]}
    alone = prepare(
        recipe(), Mixture(sources=sources, heldout_frac=1e-9), Bytes(), tmp_path / "c", Silent()
    )
    sources["tiny"] = sources["web"].model_copy(update={"path": str(tiny)})
    both = prepare(
        recipe(), Mixture(sources=sources, heldout_frac=1e-9), Bytes(), tmp_path / "c", Silent()
    )
    (held,) = texts_of(both.heldout["tiny"])
    assert held.strip() in texts_of(alone.train["web"])
    assert held.strip() in texts_of(both.heldout["web"])
    assert held.strip() not in texts_of(both.train["web"])
    assert both.fingerprints["web"] != alone.fingerprints["web"]


def test_half_empty_documents_leave_exact_counts(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": "" if i % 2 else f"text {i}"}) for i in range(100)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepared = prepare(recipe(), mixture(folder), Bytes(), tmp_path / "cache", Silent())
    counts = [prepared.train["web"].counts, prepared.heldout["web"].counts]
    assert sum(each.num_documents for each in counts) == 50
    for rows in (prepared.train["web"], prepared.heldout["web"]):
        assert all(rows[i]["segments"].any() for i in range(len(rows)))


def test_rows_are_those_of_packing_each_part(corpus, tmp_path):
    prepared = prepare(recipe("whole"), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    rows = prepared.heldout["web"]
    documents = ([np.array(Bytes().encode(t), np.int32)] for t in prepared.heldout_documents("web"))
    for index, expected in enumerate(pack(documents, "whole", ROW_TOKENS, 2, 1)):
        for name, array in zip(("tokens", "targets", "segments"), expected, strict=True):
            np.testing.assert_array_equal(rows[index][name], array)


@pytest.mark.parametrize("line", ["[" * 100_000, "nothing", '{"txt": "a"}', "[1]"])
def test_held_out_documents_that_are_none_are_refused(corpus, tmp_path, line):
    write_corpus(corpus)
    prepared = prepare(recipe(), mixture(corpus), Bytes(), tmp_path / "cache", Silent())
    folder = prepared.train["web"].folder
    (folder / parts.DOCUMENTS_FILE).write_text(line)
    content = json.loads((folder / META_FILE).read_text())["content"]
    content["documents_sha256"] = hashlib.sha256(line.encode()).hexdigest()
    write_rows_meta(folder, content)
    with pytest.raises(DataError, match=parts.DOCUMENTS_FILE):
        prepared.heldout_documents("web")
