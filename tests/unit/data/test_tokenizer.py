"""Tokenizers give back the text they were given, and models are the same every time."""

import io
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from glamcli.data import tokenizer as tokenizers
from glamcli.data.embedded import embedded_documents
from glamcli.data.tokenizer import (
    Bytes,
    SentencePiece,
    load_sentencepiece,
    slices,
    train_sentencepiece,
)
from glamcli.errors import DataError

ODD = ["\n", "\t", "  ", "\r\n", "\0", "<s>", "</s>", "<0x41>", "é", "日本", "🙂"]
MARKS = ["\u2581", "\u2581 \u2581"]  # SentencePiece's own sign for a space
mixed = st.lists(st.one_of(st.sampled_from(ODD + MARKS), st.text(max_size=8)), max_size=8).map(
    "".join
)


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in embedded_documents("reference")]


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    return train_sentencepiece(texts, 1024, tmp_path_factory.mktemp("tokenizer") / "a.model")


@given(mixed)
def test_sentencepiece_gives_every_text_back(model, text):
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert all(3 < token_id < model.vocab_size for token_id in ids)


@given(mixed)
def test_bytes_give_every_text_back(text):
    ids = Bytes().encode(text)
    assert Bytes().decode(ids) == text
    assert [token_id - 3 for token_id in ids] == list(text.encode())


@given(st.text(alphabet=["a", " ", "\n", "é", "\u2581"], max_size=300))
def test_long_texts_are_encoded_in_slices_that_lose_nothing(model, text):
    parts = list(slices(text, 16))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 16 for part in parts)
    assert model.decode([i for part in parts for i in model.encode(part)]) == text


def test_chunks_are_the_ids(model, texts, monkeypatch):
    monkeypatch.setattr(tokenizers, "SLICE_CHARS", 100)
    for tokenizer in (Bytes(), model):
        chunks = list(tokenizer.encode_chunks(texts[0]))
        assert len(chunks) > 10
        assert np.concatenate(chunks).tolist() == tokenizer.encode(texts[0])
        assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_training_twice_gives_the_same_file_and_writes_nothing(texts, tmp_path, model, capfd):
    again = train_sentencepiece(texts, 1024, tmp_path / "b.model")
    assert again.fingerprint == model.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["b.model"]
    assert load_sentencepiece(tmp_path / "b.model").fingerprint == model.fingerprint
    assert capfd.readouterr() == ("", "")


def test_special_ids_are_those_of_the_contract(model):
    assert model.vocab_size == 1024
    assert [model.piece(i) for i in range(4)] == ["<pad>", "</s>", "<s>", "<unk>"]
    assert model.decode([0, 1, 2]) == ""
    assert model.piece(5000) == Bytes().piece(5000) == "<5000>"
    assert model.decode([5000, *model.encode("a")]) == Bytes().decode([5000, 3 + 97]) == "a"


def test_a_pickled_tokenizer_encodes_alike(model):
    assert pickle.loads(pickle.dumps(model)).encode("some text") == model.encode("some text")


def test_lone_surrogates_become_question_marks(model):
    assert model.decode(model.encode("a\ud800b")) == "a?b"
    assert Bytes().decode(Bytes().encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    ("vocab_size", "what"),
    [(100, "needs at least 271"), (5000, "the text has only 299")],
)
def test_an_impossible_vocabulary_says_what_is_possible(tmp_path, vocab_size, what):
    with pytest.raises(DataError, match=what):
        train_sentencepiece(["hello world, hello\nthere"] * 3, vocab_size, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text to train on"):
        train_sentencepiece([], 300, tmp_path / "x.model")


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_sentencepiece(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_sentencepiece(tmp_path / "bad.model")


def foreign_model(texts, **settings) -> SentencePiece:
    """A model as another project would train it, with our special ids."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 400, "model_type": "bpe", **settings},
    )
    return SentencePiece(out.getvalue(), "foreign.model")


FOREIGN = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "default": {"model_type": "unigram", "vocab_size": 120},
    "no prefix": {"add_dummy_prefix": False},
    "fallback": {"byte_fallback": True},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_slices_of_a_foreign_model_give_the_ids_of_the_whole_text(kind, monkeypatch):
    texts = [
        "The ﬁrst  line\nof two ½ words, and a\tlong-one-without-any-space " * 3,
        " a",
        "b ",
        "",
    ]
    tokenizer = foreign_model(texts[:2], **FOREIGN[kind])
    whole = [tokenizer._processor.encode(text) for text in texts]
    assert not tokenizer.keeps_text
    monkeypatch.setattr(tokenizers, "SLICE_CHARS", 40)
    assert [tokenizer.encode(text) for text in texts] == whole
    assert len(list(tokenizer.encode_chunks(texts[0]))) > 4
    *before, last = tokenizer.encode("o\u2581o")
    assert before == tokenizer.encode("o") + tokenizer._mark_ids
    assert tokenizer.piece(last) == "o"


def test_only_a_model_that_gives_every_text_back_keeps_text(model, texts):
    assert Bytes().keeps_text
    assert model.keeps_text
    identity = {"normalization_rule_name": "identity", "add_dummy_prefix": False}
    identity["remove_extra_whitespaces"] = False
    assert foreign_model(texts[:20], **identity, byte_fallback=True).keeps_text
    assert not foreign_model(texts[:20], **identity).keeps_text  # unknown characters are lost


def test_models_with_other_special_ids_are_refused(texts):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:20]), model_writer=out, vocab_size=300, minloglevel=2
    )
    with pytest.raises(DataError, match=r"are \[-1, 2, 1\], expected \[0, 1, 2\]"):
        SentencePiece(out.getvalue(), "other.model")
