import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.evals.scoring.batches import (
    _CACHE_BYTES,
    _LOGITS_BYTES,
    _MIN_TRUNK,
    BatchPlanner,
    _find_trunks,
    _group_requests,
    _num_common,
)
from glamcli.evals.scoring.requests import Request
from glamcli.evals.scoring.shapes import Shape, plan_shapes, rounded

sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60)


kinds = st.builds(Shape, st.sampled_from([0, 64]), st.integers(1, 5), st.booleans())


def plain(rows, length, targets):
    return Shape(rows=rows, length=length, targets=targets)


@given(sizes, st.sampled_from([256, 2048]), st.lists(kinds, min_size=60, max_size=60))
def test_every_request_is_planned_once_and_fits_its_shape(sizes, batch_tokens, kinds):
    planner = BatchPlanner(batch_tokens, 1000, 0, None)
    wanted = [
        kind._replace(length=length, targets=count)
        for kind, (length, count) in zip(kinds, sizes, strict=False)
    ]
    planned = plan_shapes([planner._fitted(each) for each in wanted], 8 * batch_tokens)
    assert sorted(i for members in planned.values() for i in members) == list(range(len(sizes)))
    for shape, members in planned.items():
        for index in members:
            assert wanted[index].kind == shape.kind
            assert sizes[index][0] <= shape.length
            assert sizes[index][1] <= shape.targets


@given(
    st.integers(1, 2000),
    st.integers(1, 500),
    kinds,
    st.sampled_from([259, 256_000]),
    st.sampled_from([0, 10**4, 10**6]),
)
def test_a_batch_keeps_within_its_tokens_logits_and_caches(
    length, targets, kind, vocab_size, position_bytes
):
    planner = BatchPlanner(4096, vocab_size, position_bytes, None)
    shape = planner._fitted(kind._replace(length=length, targets=targets))
    if shape.rows > 1:
        assert shape.rows * shape.row_tokens <= 4096
        assert 4 * shape.rows * shape.options * shape.targets * vocab_size <= _LOGITS_BYTES
        assert shape.rows * shape.row_positions * position_bytes <= _CACHE_BYTES


@given(st.integers(1, 5000), st.sampled_from([8, 16]))
def test_sizes_are_few_and_pad_by_a_third_at_most(count, smallest):
    size = rounded(count, smallest)
    assert size >= count
    assert size == smallest or size - count <= size / 3
    assert size // (size & -size) in (1, 3)


def test_few_requests_share_one_shape():
    planner = BatchPlanner(2048, 300, 0, None)
    shapes = [planner._fitted(plain(1, length, 4)) for length in (20, 30, 50, 90, 200)]
    assert list(plan_shapes(shapes, 8 * 2048)) == [plain(8, 256, 8)]


@pytest.mark.parametrize(
    ("count", "compiled", "shape"),
    [
        (3, {(8, 256, 8)}, (8, 256, 8)),
        (3, {(8, 256, 8), (64, 32, 8)}, (64, 32, 8)),
        (300, {(8, 256, 8)}, (64, 32, 8)),
    ],
)
def test_a_compiled_shape_is_used_unless_padding_costs_more(count, compiled, shape):
    planned = plan_shapes([plain(64, 32, 8)] * count, 8 * 2048, {plain(*each) for each in compiled})
    assert list(planned) == [plain(*shape)]


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
    for one in _group_requests(group):
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
    found = _find_trunks(heads)
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
    assert _find_trunks(heads) == [(len(first), (0, 2, 4)), (len(second), (1, 3))]
