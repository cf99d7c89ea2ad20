"""Held-out documents are chosen by text alone, in all sources alike, and never reach training."""

import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.config.mixtures import Mixture, Source
from glamcli.data import split
from glamcli.data.split import Sides, divide_mixture, document_digest, exceptions, first_documents
from glamcli.progress import Silent

texts = st.lists(st.text(max_size=3), max_size=30)
mixtures = st.lists(texts, max_size=5)
fractions = st.sampled_from([0.0, 1e-9, 0.02, 0.5, 0.999])


def divide(documents, frac):
    return divide_all([list(documents)], frac)[0]


def divide_all(sources, frac):
    windows = {str(i): first_documents(each, frac) for i, each in enumerate(sources)}
    sides = Sides(frac, exceptions(windows, frac) if frac else {})
    return [list(sides.divide(each)) for each in sources]


def normal(text):
    return " ".join(text.split())


@given(mixtures, fractions)
def test_no_text_is_on_both_sides_in_any_sources_and_order_is_kept(sources, frac):
    divided = divide_all(sources, frac)
    assert [[text for text, _ in each] for each in divided] == sources
    sides = {True: set(), False: set()}
    for each in divided:
        for text, is_held in each:
            sides[is_held].add(normal(text))
    assert sides[True].isdisjoint(sides[False])


@given(mixtures, fractions)
def test_every_source_has_a_document_to_train_on(sources, frac):
    for documents, divided in zip(sources, divide_all(sources, frac), strict=True):
        assert not documents or not all(is_held for _, is_held in divided)


@given(texts, fractions)
def test_both_sides_get_a_document_when_there_are_two(documents, frac):
    sides = {is_held for _, is_held in divide(documents, frac)}
    if len(set(map(normal, documents))) > 1 and frac > 0:
        assert sides == {True, False}
    elif documents:
        assert sides == {False}


@given(st.text(alphabet="ab \n\t\x1c\u2003\ud800é", max_size=12))
def test_the_digest_of_a_long_text_is_that_of_the_whole(text):
    whole = hashlib.sha256(normal(text).encode("utf-8", "replace")).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "DIGESTED_CHARS", 3)
        assert document_digest(text) == whole
    assert document_digest(text) == whole


def test_the_digest_of_a_long_text_takes_little_memory():
    text = "word " * (1 << 21)
    tracemalloc.start()
    document_digest(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(text)


def test_white_space_makes_no_other_document():
    documents = [f"{i} red  green\n{i}" for i in range(500)]
    copies = [text.replace("\n", " \r\n").replace("  ", "\t") + " " for text in documents]
    assert len(set(documents) | set(copies)) == 1000
    (one, other) = divide_all([documents, copies], 0.2)
    assert [is_held for _, is_held in one] == [is_held for _, is_held in other]


def test_what_one_source_must_hold_out_another_does_not_train_on():
    small = [f"of the small one: {i}" for i in range(4)]
    large = [f"of the large one: {i}" for i in range(400)] + small
    divided = divide_all([large, small], 0.01)
    (held,) = [text for text, is_held in divided[1] if is_held]
    assert (held, True) in divided[0]
    assert (held, False) in divide(large, 0.01), "the large source alone would train on it"


def test_what_one_source_must_train_on_another_does_not_hold_out():
    held = next(
        f"text {i}" for i in range(1000) if split.is_heldout(document_digest(f"text {i}"), 0.01)
    )
    large = [f"of the large one: {i}" for i in range(400)] + [held]
    assert (held, True) in divide(large, 0.01)
    divided = divide_all([large, [held]], 0.01)
    assert divided[1] == [(held, False)]
    assert (held, False) in divided[0]


def test_a_full_window_is_enough(monkeypatch):
    monkeypatch.setattr(split, "WINDOW_DOCUMENTS", 3)
    documents = [str(i % 7) for i in range(50)]
    divided = divide(documents, 1e-9)
    held = {text for text, is_held in divided if is_held}
    assert len(held) == 1
    assert sum(is_held for _, is_held in divided) == documents.count(held.pop())


def test_the_share_held_out_is_about_the_fraction_and_does_not_depend_on_order():
    documents = [f"document {i}" for i in range(20_000)]
    held = {text for text, is_held in divide(documents, 0.05) if is_held}
    assert 900 < len(held) < 1100
    assert held == {text for text, is_held in divide(reversed(documents), 0.05) if is_held}


def test_a_small_source_does_not_lose_its_longest_text():
    documents = [letter * size for letter, size in (("a", 100_000), ("b", 50_000), ("c", 10))]
    for order in (documents, documents[::-1], documents[:2]):
        held = [text for text, is_held in divide(order, 1e-9) if is_held]
        assert held == [min(order, key=len)]


@pytest.fixture
def mixture(tmp_path):
    for name, count in (("web", 200), ("tiny", 3)):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {
        name: Source(kind="jsonl", path=str(tmp_path / f"{name}.jsonl"), weight=1)
        for name in ("web", "tiny")
    }
    return Mixture(sources=sources, heldout_frac=0.05)


def test_a_source_is_looked_into_once(mixture, tmp_path, monkeypatch):
    first = divide_mixture(mixture, tmp_path / "cache", Silent())
    assert list(first.exceptions.values()) == [True]  # of three documents
    monkeypatch.setattr(split, "documents", None)  # would fail if it were called
    assert divide_mixture(mixture, tmp_path / "cache", Silent()) == first
    with pytest.raises(TypeError):
        divide_mixture(
            mixture.model_copy(update={"heldout_frac": 0.1}), tmp_path / "cache", Silent()
        )


def test_what_a_crash_left_is_read_again(mixture, tmp_path):
    first = divide_mixture(mixture, tmp_path, Silent())
    for path in (tmp_path / "heldout").iterdir():
        path.write_text(path.read_text()[:-9])
    assert divide_mixture(mixture, tmp_path, Silent()) == first


def test_with_nothing_to_hold_out_nothing_is_read_or_written(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(split, "documents", None)
    none = divide_mixture(
        mixture.model_copy(update={"heldout_frac": 0.0}), tmp_path / "cache", Silent()
    )
    assert not any(is_held for _, is_held in none.divide(["a", "b"]))
    assert not (tmp_path / "cache").exists()
