import dataclasses
import os
import signal
from functools import partial

import numpy as np
import pytest

from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.data.open import open_data
from glamcli.errors import DataError
from glamcli.evals.paper import corpus
from glamcli.evals.paper.ngrams import Grams, words
from glamcli.evals.paper.overlap import _overlaps, _split_scores, _task_words
from glamcli.evals.results.scores import Measured, Results, Score
from glamcli.progress import Silent

LONG = "The quick brown fox jumps over the lazy dog and then it sleeps for an hour"
SHORT = "seven words are too few to judge"
EIGHT = "Exactly eight words are looked for as whole"
FRESH = "nobody ever wrote this sentence of more than eight words down before today"
TASK = _task_words("t", ("long", "short", "eight", "fresh"), (LONG, SHORT, EIGHT, FRESH))
NINE = dataclasses.replace(TASK, n=9)


def judged(text, task=NINE):
    def search(grams):
        held = np.zeros(grams.count, bool)
        held[grams.found([text])] = True
        return {"web": held}

    (found,) = _overlaps([task], search)
    return found


def test_n_is_the_fifth_percentile_between_eight_and_thirteen():
    lengths = {5: 8, 10: 10, 40: 13}
    for length, n in lengths.items():
        assert _task_words("t", ("a",) * 9, ("w " * length,) * 9).n == n


def test_words_are_compared_without_case_and_punctuation():
    assert words("It's U.S.-made, «Ünder_score» 42!") == [
        "it", "s", "u", "s", "made", "ünder", "score", "42",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "dirty"),
    [
        ("x y, THE LAZY dog; and then: it sleeps for an... z", ("long",)),  # nine words of it
        ("x the lazy dog and then it sleeps for a year", ()),  # eight of them
        ("the lazy dog and then it strange sleeps for an", ()),
        (EIGHT.upper() + " and more", ("eight",)),
        (SHORT, ()),
        (FRESH + " " + LONG, ("long", "fresh")),
        ("", ()),
    ],
)
def test_n_words_in_a_row_make_an_item_dirty(text, dirty):
    assert judged(text).dirty == dirty


def test_short_items_are_not_judged():
    found = judged(LONG)
    assert (found.num_items, found.num_judged, found.by_source) == (4, 3, {"web": 1})
    assert found.dirty_frac == pytest.approx(1 / 3)


def test_no_gram_goes_on_from_one_text_into_the_next():
    grams = Grams(gram for gram in NINE.grams(0))
    first, second = LONG[:40], LONG[40:]
    assert len(grams.found([LONG])) == len(NINE.grams(0))
    assert len(grams.found([first, second])) < len(NINE.grams(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus whose documents go on over many rows, and a recipe of it."""
    folder = tmp_path_factory.mktemp("overlap")
    texts = [" ".join(f"w{(i * 7 + j * j) % 97}" for j in range(60 + i)) for i in range(40)]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "mixture.yaml").write_text(
        f"sources: {{texts: {{kind: text, path: {folder}/texts.txt, separator: line, weight: 1}}}}"
    )
    settings = [f"data.mixture={folder}/mixture.yaml", f"data.cache_dir={folder}/cache",
                "batch.row_tokens=32", "model.vocab_size=259"]  # fmt: skip
    return folder, texts, settings


@pytest.mark.parametrize("packing", ["fill", "whole"])
def test_documents_are_put_together_again_whatever_the_pieces(data, packing, monkeypatch):
    _, texts, settings = data
    monkeypatch.setattr(corpus, "_PIECE_TOKENS", 320)
    dataset = open_data(load_recipe("test-tiny", [*settings, f"data.packing={packing}"]).recipe,
                        Silent())  # fmt: skip
    pieces = list(corpus._row_pieces(dataset, packing))
    found = [text for _, piece in pieces for text in piece(dataset.tokenizer)]
    assert len(pieces) > 5
    if packing == "fill":
        assert set(found) <= set(texts)
        assert len(found) == dataset.prepared.train["texts"].counts.num_documents
    else:  # every piece by itself
        assert all(any(text in whole for whole in texts) for text in found)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_is_looked_through_without_what_is_held_out(
    data, tmp_path, processes, monkeypatch
):
    folder, texts, _ = data
    task = _task_words("t", texts, texts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mixture = load_mixture(f"{folder}/mixture.yaml")
    search = partial(
        corpus.search_text, text=mixture, packing="", progress=Silent(), processes=processes
    )
    (found,) = _overlaps([task], search)
    assert 0.5 < found.dirty_frac <= 1


class Deadly(Grams):
    """Ends the process that searches, as the kernel does when memory runs out."""

    def found(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)
        return super().found(texts)


def test_a_search_process_that_dies_is_an_error_with_advice(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mixture = load_mixture(f"{data[0]}/mixture.yaml")
    with pytest.raises(DataError, match="searches for overlap ended unexpectedly") as caught:
        corpus.search_text(Deadly([("a", "b")]), mixture, "", Silent(), processes=2)
    assert "fewer `--processes`" in str(caught.value.hint)


def test_scores_are_told_apart_for_clean_and_dirty_items():
    found = judged(LONG)
    records = [{"key": key, "accuracy": value} for key, value in
               (("long", 1.0), ("short", 0.0), ("eight", 1.0), ("fresh", 0.0))]  # fmt: skip
    score = Score("t", 0, "0", (Measured("accuracy", 0.5, None, {}),), 4, 0, 0, 0, (), {}, (),
                  tuple(records))  # fmt: skip
    results = Results("s", {}, (score,), ())
    (split,) = _split_scores([NINE], [found], results)
    assert (split.all, split.clean, split.dirty) == (0.5, pytest.approx(1 / 3), 1.0)
    assert (split.num_clean, split.num_dirty) == (3, 1)
    # Scores of items that were not looked for say nothing of what is clean.
    others = dataclasses.replace(score, items=(*records, {"key": "other", "accuracy": 1.0}))
    assert _split_scores([NINE], [found], Results("s", {}, (others,), ())) == []
