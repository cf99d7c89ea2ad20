from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.data.tokenizer import Bytes
from glamcli.evals.scoring.requests import make_requests


class Pairs:
    """A tokenizer that joins letters two by two, so that pieces may span any border."""

    bos_id = 2

    def encode(self, text):
        return [crc32(text[i : i + 2].encode()) % 1000 + 10 for i in range(0, len(text), 2)]


def split(encoder, context, continuation):
    """Ids of the context behind BOS, and those that are scored."""
    (made,) = make_requests(encoder, [(context, continuation)], 99) or []
    assert made.ids[0] == encoder.bos_id
    return list(made.ids[1 : -made.num_scored]), list(made.ids[-made.num_scored :])


def test_context_and_continuation_are_split_where_the_context_ends():
    context, scored = split(Bytes(), "Q: a", " b")
    assert (Bytes().decode(context), Bytes().decode(scored)) == ("Q: a", " b")


def test_trailing_blanks_belong_to_what_is_scored():
    context, scored = split(Bytes(), "Q: \n", "b")
    assert (Bytes().decode(context), Bytes().decode(scored)) == ("Q:", " \nb")


@given(st.text("abc", max_size=7), st.text("abc", min_size=1, max_size=7))
def test_every_character_of_the_continuation_is_scored(context, continuation):
    first, scored = split(Pairs(), context, continuation)
    assert [*first, *scored] == Pairs().encode(context + continuation)
    assert len(scored) >= 1
    assert len(first) * 2 <= len(context)


def test_an_empty_context_is_the_beginning_of_a_document():
    (made,) = make_requests(Bytes(), [("", "ab")], window=8) or []
    assert made.ids == (2, *Bytes().encode("ab"))
    assert made.num_scored == 2


@pytest.mark.parametrize("window", [5, 6, 7, 20])
def test_the_beginning_of_a_context_is_cut_alike_for_all_options(window):
    made = make_requests(Bytes(), [("context", "12"), ("context", "12345")], window) or []
    contexts = [Bytes().decode(list(each.ids[1 : -each.num_scored])) for each in made]
    assert contexts == ["context"[max(0, 7 - (window - 5)) :]] * 2
    assert all(each.num_inputs <= window for each in made)
    assert made[1].num_cut == max(0, 7 - (window - 5))


def test_an_option_longer_than_the_window_is_refused():
    assert make_requests(Bytes(), [("context", "123456")], 5) is None
