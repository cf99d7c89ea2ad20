import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.model import draws

KEY = jax.random.key(42)


@pytest.mark.parametrize("shape", [(7,), (5, 8)])
def test_bits_are_those_of_jax_random(shape):
    expected = np.asarray(jax.random.bits(KEY, shape))
    np.testing.assert_array_equal(np.asarray(draws.bits(KEY, shape)), expected)


def test_values_are_those_of_jax_random():
    expected = jax.random.uniform(KEY, (50, 8), minval=-0.3, maxval=0.3)
    found = draws.uniform(KEY, (50, 8), -0.3, 0.3)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-7)
    expected = 0.5 * jax.random.normal(KEY, (50, 8))
    np.testing.assert_allclose(
        np.asarray(draws.normal(KEY, (50, 8), 0.5)), np.asarray(expected), rtol=1e-5, atol=1e-6
    )


def test_every_element_of_more_dimensions_has_its_own_counter():
    many = np.asarray(draws.bits(KEY, (4, 3, 32, 16)))
    assert len(np.unique(many)) == many.size
    np.testing.assert_array_equal(many[0, 0], np.asarray(draws.bits(KEY, (32, 16))))


def test_gaussian_moments_and_tails():
    values = np.asarray(jax.jit(lambda k: draws.normal(k, (2, 100, 5000), 1.0))(KEY), np.float64)
    assert values.mean() == pytest.approx(0, abs=4e-3)
    assert values.std() == pytest.approx(1, abs=3e-3)
    assert (values**4).mean() == pytest.approx(3, abs=0.05)
    assert np.isfinite(values).all()
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 6e-3
    assert (np.abs(values) > 4).mean() == pytest.approx(6.3e-5, rel=0.5)


def test_keys_can_be_mapped_over():
    keys = jax.random.split(KEY, 3)
    mapped = np.asarray(jax.vmap(lambda key: draws.bits(key, (2, 3, 4)))(keys))
    single = np.asarray(draws.bits(keys[1], (2, 3, 4)))
    np.testing.assert_array_equal(mapped[1], single)
    assert mapped.dtype == jnp.uint32
