"""Beam search on the host: which endings count, and when nothing better can come."""

import numpy as np
import pytest

from glamcli.beam_search import Search
from glamcli.data.tokenizer import Bytes

TOKENIZER = Bytes()
EOS = TOKENIZER.eos_id
A, B = (3 + ord(letter) for letter in "ab")


def search(width, alpha):
    return Search(TOKENIZER, [TOKENIZER.bos_id], width, alpha, ())


def extend(search, *rows):
    """One step of rows of (token, nats), best first."""
    ids_WK = np.array([[token for token, _ in row] for row in rows])
    nats_WK = np.array([[nats for _, nats in row] for row in rows], np.float32)
    return search.extend(nats_WK, ids_WK)


def test_an_ending_counts_only_among_the_best_of_its_step():
    found = search(width=2, alpha=0.0)
    assert extend(found, [(A, -0.1), (B, -0.2)]) == ([0, 0], [A, B])
    # In order: the end of `a`, `aa`, the end of `b` (third of two), `bb`.
    assert extend(found, [(EOS, -0.1), (A, -0.2)], [(EOS, -0.25), (B, -0.3)]) == ([0, 1], [A, B])
    assert [each.ids for each in found.ended] == [(A, EOS)]


def test_a_search_goes_on_while_a_longer_text_may_still_win():
    found = search(width=1, alpha=1.0)
    extend(found, [(EOS, -2.0), (A, -3.0)])
    # At 13 tokens the penalty is 3: -3 / 3 would beat -2, were all that follows certain.
    assert not found.settled(limit=13)
    assert found.settled(limit=2)
    extend(found, [(B, -3.0), (EOS, -9.0)])
    assert found.settled(limit=13)
    assert found.results()[0].score == pytest.approx(-2.0)
