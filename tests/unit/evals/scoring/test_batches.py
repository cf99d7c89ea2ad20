import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.evals.scoring.batches import (
    _CACHE_BYTES,
    _LOGITS_BYTES,
    Budget,
    Shape,
    plan_shapes,
    rounded,
)

sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60)


kinds = st.builds(Shape, st.sampled_from([0, 64]), st.integers(1, 5), st.booleans())


def plain(rows, length, targets):
    return Shape(rows=rows, length=length, targets=targets)


@given(sizes, st.sampled_from([256, 2048]), st.lists(kinds, min_size=60, max_size=60))
def test_every_request_is_planned_once_and_fits_its_shape(sizes, batch_tokens, kinds):
    budget = Budget(batch_tokens, 1000)
    wanted = [
        kind._replace(length=length, targets=count)
        for kind, (length, count) in zip(kinds, sizes, strict=False)
    ]
    planned = plan_shapes([budget._fitted(each) for each in wanted], 8 * batch_tokens)
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
    budget = Budget(4096, vocab_size, position_bytes)
    shape = budget._fitted(kind._replace(length=length, targets=targets))
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
    shapes = [Budget(2048, 300)._fitted(plain(1, length, 4)) for length in (20, 30, 50, 90, 200)]
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
