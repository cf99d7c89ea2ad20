from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glamcli.config import schema
from glamcli.model.attention import Attention
from glamcli.model.kernels.attention import attend, attend_rows
from glamcli.model.params import blueprint
from unit.model import decoder_reference

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)


def small(**changes):
    sizes = {"num_layers": 1, "model_dim": 12, "ffn_dim": 8, "num_heads": 3, "head_dim": 8}
    return schema.Model(**(sizes | {"vocab_size": 8, "activation_dtype": "float32"} | changes))


@pytest.mark.parametrize("zero_logit", [True, False])
@pytest.mark.parametrize("attention_scale", ["folded", "sqrt"])
def test_equals_a_loop_over_queries_and_heads(zero_logit, attention_scale):
    model = small(zero_logit=zero_logit, attention_scale=attention_scale)
    plan = blueprint(lambda rngs: Attention(rngs, model))
    params = jax.jit(plan.init)(jax.random.key(0))
    x_BSM = 3 * jax.random.normal(jax.random.key(1), (2, 9, 12))
    found = jax.jit(lambda p, x, s: plan.bind(p)(x, s))(params, x_BSM, SEGMENTS)
    for b in range(2):
        real = SEGMENTS[b] != 0
        expected = decoder_reference.attention(
            np.asarray(x_BSM[b], np.float64), SEGMENTS[b], decoder_reference.float64(params), model
        )
        np.testing.assert_allclose(np.asarray(found[b])[real], expected[real], atol=2e-5)


@pytest.mark.parametrize(("scale", "power"), [("folded", 1.0), ("sqrt", 0.0)])
def test_scale_is_in_the_initial_queries_or_at_run_time_never_both(scale, power):
    model = small(model_dim=64, num_heads=16, head_dim=32, attention_scale=scale)
    attention = Attention(nnx.Rngs(0), model)
    std = {name: np.std(np.asarray(getattr(attention, name)[...])) for name in ("query", "key")}
    assert std["key"] == pytest.approx(64**-0.5, rel=0.03)
    assert std["query"] == pytest.approx(64**-0.5 * 32 ** (-power / 2), rel=0.03)
    assert (attention.scale is None) == (scale == "folded")


def flat_attention(logit, zero_logit):
    """Two keys of equal logit, values 1; the second query sees both."""
    ones_BSND = jnp.ones((1, 2, 1, 1))
    bias = jnp.zeros((1, 1, 2, 2))
    mask = jnp.tril(jnp.ones((2, 2), bool))[None]
    out = attend(logit * ones_BSND, ones_BSND, ones_BSND, bias, mask, zero_logit=zero_logit)
    return np.asarray(out)[0, :, 0, 0]


def test_zero_logit_takes_its_share():
    np.testing.assert_allclose(flat_attention(0.0, True), [1 / 2, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(flat_attention(0.0, False), [1, 1], rtol=1e-6)


@pytest.mark.parametrize("zero_logit", [True, False])
def test_large_logits_do_not_overflow(zero_logit):
    np.testing.assert_allclose(flat_attention(1e4, zero_logit), [1, 1], rtol=1e-6)
    expected = 0.0 if zero_logit else 1.0
    np.testing.assert_allclose(flat_attention(-1e4, zero_logit), [expected] * 2, atol=1e-6)


def equations(jaxpr):
    """Every equation, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from equations(inner)


def test_logits_and_softmax_are_float32_under_bfloat16():
    model = small(activation_dtype="bfloat16")
    plan = blueprint(lambda rngs: Attention(rngs, model))
    x_BSM = jnp.ones((2, 9, 12), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda p: plan.bind(p)(x_BSM, jnp.asarray(SEGMENTS)))(plan.shapes)
    exponentials = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "exp"]
    assert exponentials
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in exponentials)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("zero_logit", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_row_by_row_equals_all_at_once_with_gradients(zero_logit, dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, 9, 3, 8), dtype) for key in keys[:3])
    bias = jax.random.normal(keys[3], (1, 3, 9, 9))
    pull = jax.random.normal(keys[4], (2, 9, 3, 8))
    mask = jnp.equal(SEGMENTS[:, :, None], SEGMENTS[:, None, :]) & jnp.tri(9, dtype=bool)[None]

    def gradient(core):
        def loss(q, k, v, bias):
            return jnp.sum(core(q, k, v, bias, mask).astype(jnp.float32) * pull)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)

    found = gradient(partial(attend_rows, zero_logit=zero_logit))
    expected = gradient(partial(attend, zero_logit=zero_logit))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.06
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))
