import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.evals.scoring.batches import (
    CACHE_BYTES,
    LOGITS_BYTES,
    Budget,
    Kind,
    plan,
    rounded,
    shape_for,
)

sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60)


ROWS = Kind()
kinds = st.builds(Kind, st.sampled_from([0, 64]), st.integers(1, 5), st.booleans())


@given(sizes, st.sampled_from([256, 2048]), kinds)
def test_every_request_is_planned_once_and_fits_its_shape(sizes, batch_tokens, kind):
    budget = Budget(batch_tokens, 1000)
    shapes = [shape_for(length, count, kind, budget) for length, count in sizes]
    buckets = plan(shapes, kind, 8 * batch_tokens)
    assert sorted(i for bucket in buckets for i in bucket.members) == list(range(len(sizes)))
    for bucket in buckets:
        for index in bucket.members:
            assert sizes[index][0] <= bucket.shape[1]
            assert sizes[index][1] <= bucket.shape[2]
    assert len({bucket.shape for bucket in buckets}) == len(buckets)


@given(
    st.integers(1, 2000),
    st.integers(1, 500),
    kinds,
    st.sampled_from([259, 256_000]),
    st.sampled_from([0, 10**4, 10**6]),
)
def test_a_batch_keeps_within_its_tokens_logits_and_caches(
    length, targets, kind, vocab_size, place_bytes
):
    shape = shape_for(length, targets, kind, Budget(4096, vocab_size, place_bytes))
    rows, _, targets = shape
    if rows > 1:
        assert rows * kind.tokens(shape) <= 4096
        assert 4 * rows * kind.options * targets * vocab_size <= LOGITS_BYTES
        assert rows * kind.places(shape) * place_bytes <= CACHE_BYTES


@given(st.integers(1, 5000), st.sampled_from([8, 16]))
def test_sizes_are_few_and_pad_by_a_third_at_most(count, smallest):
    size = rounded(count, smallest)
    assert size >= count
    assert size == smallest or size - count <= size / 3
    assert size // (size & -size) in (1, 3)


def test_few_requests_share_one_shape():
    shapes = [shape_for(length, 4, ROWS, Budget(2048, 300)) for length in (20, 30, 50, 90, 200)]
    (bucket,) = plan(shapes, ROWS, 8 * 2048)
    assert bucket.shape == (8, 256, 8)


@pytest.mark.parametrize(
    ("count", "compiled", "shape"),
    [
        (3, {(8, 256, 8)}, (8, 256, 8)),
        (3, {(8, 256, 8), (64, 32, 8)}, (64, 32, 8)),
        (300, {(8, 256, 8)}, (64, 32, 8)),
    ],
)
def test_a_compiled_shape_is_used_unless_padding_costs_more(count, compiled, shape):
    assert plan([(64, 32, 8)] * count, ROWS, 8 * 2048, compiled)[0].shape == shape
