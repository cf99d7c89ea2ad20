from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.data.tokenizer import Bytes
from glamcli.evals.scoring.requests import (
    _MIN_TRUNK,
    Request,
    _num_common,
    find_trunks,
    group_requests,
    make_requests,
)

ids = st.lists(st.integers(1, 2), max_size=8).map(tuple)
LONG = tuple(range(100, 100 + _MIN_TRUNK))


def test_common_beginnings():
    assert _num_common((1, 2, 3), (1, 2, 4)) == 2
    assert _num_common((1, 2), (1, 2, 4)) == 2
    assert _num_common((), (1,)) == 0
    assert _num_common((2,), (1,)) == 0


@given(st.lists(ids, min_size=1, max_size=4), st.integers(0, 20), st.integers(1, 3), st.data())
def test_a_group_holds_every_token_of_its_requests_in_order(tails, shared, num_scored, data):
    start = (9, *range(10, 10 + shared))
    group = [Request((*start, *tail, *[5] * num_scored), num_scored) for tail in tails]
    for one in group_requests(group):
        num = data.draw(st.integers(0, len(one.head)))
        behind = one.behind(num)
        assert len(behind.trunk) == num
        for before, after in zip(one.requests, behind.requests, strict=True):
            whole = one.prefix + before.ids
            assert behind.trunk + behind.prefix + after.ids == whole
            assert any(each.ids == whole for each in group)
            # What is scored comes behind a token that is read with it.
            assert after.num_scored < len(after.ids)


@given(st.lists(ids, max_size=12))
def test_members_of_a_trunk_begin_alike_and_belong_to_one(tails):
    heads = [LONG + tail for tail in tails]
    found = find_trunks(heads)
    members = [index for _, some in found for index in some]
    assert len(members) == len(set(members))
    for length, some in found:
        assert length >= _MIN_TRUNK
        assert len({heads[index][:length] for index in some}) == 1
    if len(heads) > 1:
        assert found


def test_a_trunk_is_not_shortened_for_items_that_share_little_of_it():
    first, second = (*LONG, 1, *LONG), (*LONG, 2, *LONG)
    heads = [(*first, 1), (*second, 1), (*first, 2), (*second, 2), (*first, 3), (3,)]
    assert find_trunks(heads) == [(len(first), (0, 2, 4)), (len(second), (1, 3))]


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
