"""Products of activations and weights: one meaning, however the operands are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.model.kernels import linear as module
from glamcli.model.kernels.linear import linear, sum_over_rows

SIZES = {"B": 2, "S": 3, "M": 4, "H": 6, "N": 5, "D": 7, "V": 8}
SPECS = ["BSM,MH->BSH", "BSM,MND->BSND", "BSND,NDM->BSM", "BSM,VM->BSV"]


def operands(spec, dtype):
    x_letters, w_letters = spec.split("->")[0].split(",")
    rng = np.random.default_rng(0)
    x = rng.normal(size=[SIZES[a] for a in x_letters])
    w = rng.normal(size=[SIZES[a] for a in w_letters])
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32)


def results(spec, x, w):
    y, pull = jax.vjp(lambda x, w: linear(spec, x, w), x, w)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return y, *pull(dy)


@pytest.mark.parametrize("one_cpu", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients_are_those_of_the_einsum(spec, one_cpu, monkeypatch):
    monkeypatch.setattr(module, "on_one_cpu", lambda: one_cpu)
    x, w = operands(spec, jnp.float32)
    got = results(spec, x, w)
    x_letters, w_letters, y_letters = module._letters(spec)
    y = np.einsum(spec, x, w)
    dy = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    dx = np.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, w)
    dw = np.einsum(f"{x_letters},{y_letters}->{w_letters}", x, dy)
    for ours, expected in zip(got, (y, dx, dw), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one_cpu", [True, False])
def test_weight_gradients_of_bfloat16_activations_are_summed_and_kept_in_float32(
    one_cpu, monkeypatch
):
    monkeypatch.setattr(module, "on_one_cpu", lambda: one_cpu)
    # 1 + 256 x 2^-9 is 1.5; bfloat16 sums would stay at 1, as 1 + 2^-9 rounds to 1.
    x = jnp.concatenate([jnp.ones((1, 1, 1)), jnp.full((1, 256, 1), 2.0**-9)], axis=1)
    w = jnp.ones((1, 1), jnp.float32)
    y, pull = jax.vjp(lambda w: linear("BSM,MH->BSH", x.astype(jnp.bfloat16), w), w)
    (dw,) = pull(jnp.ones_like(y))
    assert y.dtype == jnp.bfloat16
    assert dw.dtype == jnp.float32
    assert float(dw[0, 0]) == 1.5


@pytest.mark.parametrize(("K", "N"), [(40, 3), (3, 40), (5, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_order_of_the_operands_does_not_change_a_sum_over_rows(K, N, dtype):
    a, b = (np.random.default_rng(n).integers(-8, 9, (30, n)).astype(np.float32) for n in (K, N))
    total = jax.jit(sum_over_rows)(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, a.T @ b)
