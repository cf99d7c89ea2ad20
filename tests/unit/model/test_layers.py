import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glamcli.config import schema
from glamcli.model.layers import Embedding, GatedFfn, RmsNorm
from glamcli.model.params import blueprint, param, stacked
from unit.model import decoder_reference

MODEL = schema.Model(
    num_layers=2,
    model_dim=48,
    ffn_dim=96,
    num_heads=2,
    head_dim=8,
    vocab_size=300,
    activation_dtype="float32",
)


def test_norm_divides_by_root_mean_square_in_float32():
    norm = RmsNorm(nnx.Rngs(0), MODEL)
    scale = np.linspace(0.5, 2, 48).astype(np.float32)
    norm.scale[...] = jnp.asarray(scale)
    x = 1e-3 * jax.random.normal(jax.random.key(0), (1, 2, 48))
    for s in range(2):
        expected = decoder_reference.rms_norm(np.asarray(x[0, s], np.float64), scale, 1e-6)
        np.testing.assert_allclose(np.asarray(norm(x)[0, s]), expected, rtol=1e-5)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    huge = jnp.full((1, 1, 48), 3e18, jnp.bfloat16)
    assert np.isfinite(np.asarray(norm(huge).astype(jnp.float32))).all()


def test_ffn_gates_with_gelu():
    plan = blueprint(lambda rngs: GatedFfn(rngs, MODEL))
    params = jax.jit(plan.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 48))
    found = jax.jit(lambda p, x: plan.bind(p)(x))(params, x)
    wide = decoder_reference.float64(params)
    for s in range(3):
        expected = decoder_reference.dense_ffn(np.asarray(x[0, s], np.float64), wide)
        np.testing.assert_allclose(np.asarray(found[0, s]), expected, atol=1e-5)


def test_ffn_starts_uniform_with_unit_gain():
    ffn = GatedFfn(nnx.Rngs(0), MODEL)
    for weight, fan_in in ((ffn.gate, 48), (ffn.w_in, 48), (ffn.w_out, 96)):
        values = np.asarray(weight[...])
        assert np.abs(values).max() <= np.sqrt(3 / fan_in)
        assert values.std() == pytest.approx(fan_in**-0.5, rel=0.05)


def test_embedding_has_unit_std_and_knows_no_other_token():
    embedding = Embedding(nnx.Rngs(0), MODEL)
    assert np.std(np.asarray(embedding.table[...])) == pytest.approx(1.0, rel=0.02)
    out = np.asarray(embedding(jnp.array([[0, 299, 300]], jnp.int32)))[0]
    np.testing.assert_array_equal(out[:2], np.asarray(embedding.table[...])[[0, 299]])
    assert np.isnan(out[2]).all()


def test_every_stacked_layer_has_its_own_initial_values():
    one = blueprint(lambda rngs: GatedFfn(rngs, MODEL))
    many = stacked(one, 3)
    params = jax.jit(many.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, many.shapes)
    assert many.axes["gate"] == ("layers", "embed", "mlp")
    gate = np.asarray(params["gate"])
    assert len({gate[i].tobytes() for i in range(3)}) == 3
    alone = one.init(jax.random.split(jax.random.key(0), 3)[1])
    np.testing.assert_array_equal(np.asarray(alone["gate"]), gate[1])


def test_axes_must_name_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        param(nnx.Rngs(0), (2, 3), ("embed",))
