"""A recipe's tokenizer is trained once, on training text, and recognised when it was damaged."""

import json
from pathlib import Path

import pytest

from glamcli.config.mixtures import Mixture, Source
from glamcli.config.schema import Batch, Data, Model, Recipe, Train
from glamcli.config.schema import TokenizerSettings as TokenizerSpec
from glamcli.data import vocabulary
from glamcli.data.split import Sides, document_digest
from glamcli.data.tokenizer import SentencePiece
from glamcli.data.vocabulary import open_tokenizer
from glamcli.errors import DataError
from glamcli.progress import Silent

WORDS = ["red", "green", "blue", "black", "white", "one", "two", "three", "four", "five"]


def recipe(**settings) -> Recipe:
    return Recipe(
        model=Model(num_layers=2, model_dim=8, ffn_dim=8, num_heads=1, head_dim=8, vocab_size=320),
        batch=Batch(rows=2, row_tokens=64),
        train=Train(steps=1),
        data=Data(mixture="unused", tokenizer=TokenizerSpec(**settings)),
    )


@pytest.fixture
def texts() -> list[str]:
    return [f"{j} " + " ".join(WORDS[i * j % 10] for i in range(40)) for j in range(300)]


@pytest.fixture
def mixture(tmp_path, texts) -> Mixture:
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Source(kind="jsonl", path=str(tmp_path / "a.jsonl"), weight=1)
    return Mixture(sources={"web": source, "unused": source.model_copy(update={"weight": 0})})


def test_bytes_need_no_training(mixture, tmp_path):
    assert open_tokenizer(recipe(kind="bytes"), mixture, tmp_path, Silent()).vocab_size == 259


def test_a_tokenizer_is_trained_once_with_the_vocabulary_of_the_model(
    mixture, tmp_path, monkeypatch
):
    trained = open_tokenizer(recipe(), mixture, tmp_path / "cache", Silent())
    assert isinstance(trained, SentencePiece)
    assert trained.vocab_size == 320
    monkeypatch.setattr(vocabulary, "train_on", None)  # would fail if it were called
    again = open_tokenizer(recipe(), mixture, tmp_path / "cache", Silent())
    assert again.fingerprint == trained.fingerprint
    with pytest.raises(TypeError):
        open_tokenizer(recipe(train_vocab_size=300), mixture, tmp_path / "cache", Silent())


def test_a_file_is_used_as_it_is(mixture, tmp_path):
    trained = open_tokenizer(recipe(), mixture, tmp_path / "cache", Silent())
    path = next((tmp_path / "cache" / "tokenizers").glob("*.model"))
    given = open_tokenizer(recipe(path=str(path)), mixture, Path("/nowhere"), Silent())
    assert given.fingerprint == trained.fingerprint


def test_a_tokenizer_that_was_exchanged_is_refused(mixture, tmp_path):
    cache = tmp_path / "cache"
    open_tokenizer(recipe(), mixture, cache, Silent())
    path = next((cache / "tokenizers").glob("*.model"))
    other = open_tokenizer(recipe(train_vocab_size=300), mixture, tmp_path / "other", Silent())
    assert isinstance(other, SentencePiece)
    path.write_bytes(Path(other.name).read_bytes())
    with pytest.raises(DataError, match="checksum differs"):
        open_tokenizer(recipe(), mixture, cache, Silent())


@pytest.mark.parametrize("damage", ["empty record", "cut record", "no model"])
def test_what_a_crash_left_of_a_tokenizer_is_trained_again(mixture, tmp_path, damage):
    trained = open_tokenizer(recipe(), mixture, tmp_path, Silent())
    (model,) = (tmp_path / "tokenizers").glob("*.model")
    record = model.with_suffix(".json")
    whole = record.read_text()
    if damage == "no model":
        model.unlink()
    else:
        record.write_text("" if damage == "empty record" else whole[: len(whole) // 2])
    again = open_tokenizer(recipe(), mixture, tmp_path, Silent())
    assert again.fingerprint == trained.fingerprint
    assert record.read_text() == whole
    assert set(model.parent.iterdir()) == {model, record}


def test_held_out_documents_are_not_trained_on(mixture, texts, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(vocabulary, "train_sentencepiece", lambda sample, *_: seen.extend(sample))
    sides = Sides(
        mixture.heldout_frac, {document_digest(texts[7]): True}
    )  # as another source asks for
    vocabulary.train_on(mixture, 320, sides, tmp_path / "x", Silent())
    heldout = {text for text, is_held in sides.divide(texts) if is_held}
    assert len(heldout) > 1
    assert texts[7] in heldout
    assert heldout.isdisjoint(seen)
    assert set(seen) == set(texts) - heldout


def test_a_sample_takes_its_share_of_every_source_wherever_the_text_stands(
    mixture, texts, monkeypatch
):
    web, sides = mixture.sources["web"], Sides(0.01, {})
    share = sum(map(len, texts)) // 10
    sample = vocabulary._passages(web, "web", sides, share)
    assert share <= sum(map(len, sample)) < 1.2 * share
    positions = [texts.index(text) for text in sample]
    assert max(positions) - min(positions) > 200
    assert sample == vocabulary._passages(web, "web", sides, share)
    assert vocabulary._passages(web, "web", sides, 0) == []
