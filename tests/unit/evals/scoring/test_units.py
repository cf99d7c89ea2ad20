from hypothesis import given
from hypothesis import strategies as st

from glamcli.evals.scoring.tokens import Scorable
from glamcli.evals.scoring.units import MIN_TRUNK, common, trunks, units_of

ids = st.lists(st.integers(1, 2), max_size=8).map(tuple)
LONG = tuple(range(100, 100 + MIN_TRUNK))


def test_common_beginnings():
    assert common((1, 2, 3), (1, 2, 4)) == 2
    assert common((1, 2), (1, 2, 4)) == 2
    assert common((), (1,)) == 0
    assert common((2,), (1,)) == 0


@given(st.lists(ids, min_size=1, max_size=4), st.integers(0, 20), st.integers(1, 3), st.data())
def test_a_unit_holds_every_token_of_its_requests_in_order(tails, shared, num_scored, data):
    start = (9, *range(10, 10 + shared))
    group = [Scorable((*start, *tail, *[5] * num_scored), num_scored) for tail in tails]
    for unit in units_of(group):
        num = data.draw(st.integers(0, len(unit.head)))
        behind = unit.behind(num)
        assert len(behind.trunk) == num
        for before, after in zip(unit.parts, behind.parts, strict=True):
            whole = unit.prefix + before.ids
            assert behind.trunk + behind.prefix + after.ids == whole
            assert any(each.ids == whole for each in group)
            # What is judged comes behind a token that is read with it.
            assert after.num_scored < len(after.ids)


@given(st.lists(ids, max_size=12))
def test_members_of_a_trunk_begin_alike_and_belong_to_one(tails):
    heads = [LONG + tail for tail in tails]
    found = trunks(heads)
    members = [index for _, some in found for index in some]
    assert len(members) == len(set(members))
    for length, some in found:
        assert length >= MIN_TRUNK
        assert len({heads[index][:length] for index in some}) == 1
    if len(heads) > 1:
        assert found


def test_a_trunk_is_not_shortened_for_items_that_share_little_of_it():
    first, second = (*LONG, 1, *LONG), (*LONG, 2, *LONG)
    heads = [(*first, 1), (*second, 1), (*first, 2), (*second, 2), (*first, 3), (3,)]
    assert trunks(heads) == [(len(first), (0, 2, 4)), (len(second), (1, 3))]
