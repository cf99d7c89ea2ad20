import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glamcli.model.position import RelativeBias, bucket_table, diagonals
from unit.model import decoder_reference


def test_buckets_start_where_the_reference_code_puts_them():
    starts = np.searchsorted(bucket_table(32, 128), np.arange(32))
    wide = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert starts.tolist() == [*range(16), *wide]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (10, 300), (2, 9)])
def test_integer_boundaries_equal_the_logarithm(num_buckets, max_distance):
    table = bucket_table(num_buckets, max_distance)
    expected = [decoder_reference.bucket(d, num_buckets, max_distance) for d in range(len(table))]
    assert table.tolist() == expected
    assert table[-1] == num_buckets - 1


def test_one_bucket_holds_every_distance():
    assert bucket_table(1, 128).tolist() == [0]


def test_diagonals_are_laid_out_by_difference():
    out = diagonals(jnp.arange(7), 3, 5)
    assert out.tolist() == [[2 - s + t for t in range(5)] for s in range(3)]


def bias_and_table():
    bias = RelativeBias(nnx.Rngs(0), num_heads=2, num_buckets=32, max_distance=128)
    return bias, np.asarray(bias.table[...])


def test_bias_depends_on_distance_and_on_any_start():
    bias, table = bias_and_table()
    start = jnp.array([0, 3, 190], jnp.int32)
    moved = np.asarray(bias(7, 200, start))
    for row, first in enumerate(start.tolist()):
        for s in range(7):
            for t in range(first + s + 1):
                expected = table[:, decoder_reference.bucket(first + s - t)]
                np.testing.assert_array_equal(moved[row, :, s, t], expected)
    np.testing.assert_array_equal(np.asarray(bias.of(bias.table[...], 7, 200)), moved[0])


def test_gradient_sums_over_diagonals():
    bias, table = bias_and_table()
    S = 40
    weight_NST = jax.random.normal(jax.random.key(1), (2, S, S)) * jnp.tril(jnp.ones((S, S)))[None]
    graph, state = nnx.split(bias)

    def loss(state):
        bias = nnx.merge(graph, state)
        return jnp.sum(bias.of(bias.table[...], S, S) * weight_NST)

    found = np.asarray(nnx.to_pure_dict(jax.grad(loss)(state))["table"])
    expected = np.zeros_like(table, dtype=np.float64)
    for s in range(S):
        for t in range(s + 1):
            expected[:, decoder_reference.bucket(s - t)] += np.asarray(weight_NST)[:, s, t]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_initial_std_is_over_heads_and_buckets():
    bias = RelativeBias(nnx.Rngs(0), num_heads=256, num_buckets=32, max_distance=128)
    assert np.std(np.asarray(bias.table[...])) == pytest.approx((256 * 32) ** -0.5, rel=0.05)
    assert bias.table.dtype == jnp.float32
