"""The same loss and gradients on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glamcli.config import schema
from glamcli.config.sharding import EXPERTS
from glamcli.model.decoder import Decoder
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.kernels.experts import Experts
from glamcli.parallel.axes import GLAM, Layout
from glamcli.parallel.mesh import make_mesh

MODEL = schema.Model(
    num_layers=2,
    model_dim=16,
    ffn_dim=32,
    num_heads=4,
    head_dim=8,
    vocab_size=64,
    activation_dtype="float32",
)
MOE = schema.Moe(num_experts=4, group_tokens=16, capacity_factor=1.0)
ROWS, TOKENS = 8, 16


def loss(decoder, params, tokens_BS, dispatch):
    segments_BS = jnp.where(jnp.arange(TOKENS, dtype=jnp.int32)[None] < 12, 1, 2)
    segments_BS = jnp.broadcast_to(segments_BS, tokens_BS.shape)
    x_BSM, stats = decoder.hidden(params, tokens_BS, segments_BS, dispatch=dispatch)
    nats_BS, logz_BS = decoder.losses(params, x_BSM, tokens_BS)
    total = jnp.mean(nats_BS + 1e-2 * logz_BS**2)
    return total + 0.01 * jnp.sum(stats.get("balance_loss", jnp.zeros(())))


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_eight_devices_equal_one(moe):
    decoder = Decoder(MODEL, moe, "full")
    params = jax.jit(decoder.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, TOKENS), dtype=np.int32)

    def run(params, tokens):
        return jax.value_and_grad(lambda p: loss(decoder, p, tokens, "einsum"))(params)

    expected = jax.jit(run)(params, tokens)
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    with jax.set_mesh(mesh):
        layout = GLAM.shardings(mesh, decoder.axes)
        split = jax.device_put(params, layout)
        rows = jax.device_put(tokens, GLAM.sharding(mesh, ("batch", "seq")))
        found = jax.jit(run, out_shardings=(None, layout))(split, rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless"])
def test_one_expert_layer_over_two_dimensions_equals_one_device(dispatch):
    layer = MoeLayer(nnx.Rngs(0), MODEL, MOE)
    x_BSM = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, MODEL.model_dim))

    def run(x_BSM):
        return layer(x_BSM, jnp.ones((ROWS, TOKENS), bool), Routing(dispatch))[0]

    expected = jax.jit(run)(x_BSM)
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(x_BSM, GLAM.sharding(mesh, ("batch", None, None))))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sizes", "rounds"), [({"model": 2}, True), ({"expert": 2}, False)])
def test_sums_over_model_are_rounded_before_they_are_sent_if_the_recipe_says_so(sizes, rounds):
    settings = schema.Mesh(data=1, **sizes)
    mesh = make_mesh(settings, jax.devices()[:2])
    x_EGCM = jax.random.normal(jax.random.key(1), (4, 4, 8, 16)).astype(jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(2), (2, 4, 16, 32))
    weights = [jax.device_put(each, GLAM.sharding(mesh, EXPERTS["ffn.w_in"])) for each in weights]

    def run(expert_sums):
        layout = Layout.of(settings.model_copy(update={"expert_sums": expert_sums}))

        def both_ways(x_EGCM, w_in_EMH, w_out_EMH):
            experts = Experts(w_in_EMH, w_out_EMH, "relu", layout)
            out_EGCM, backward = jax.vjp(experts.on_slots, x_EGCM)
            return out_EGCM, *backward(out_EGCM)

        with jax.set_mesh(mesh):
            # XLA for CPU would otherwise leave the rounding out.
            options = {"xla_allow_excess_precision": False}
            program = jax.jit(both_ways).lower(x_EGCM, *weights).compile(options)
            return program(x_EGCM, *weights)

    for one, other in zip(run("float32"), run("bfloat16"), strict=True):
        assert other.dtype == jnp.bfloat16
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        assert (one != other).any() == rounds
        np.testing.assert_allclose(one, other, atol=2**-6 * np.abs(one).max())


def test_initial_values_do_not_depend_on_the_mesh():
    decoder = Decoder(MODEL, MOE)
    expected = jax.jit(decoder.init)(jax.random.key(0))
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    layout = GLAM.shardings(mesh, decoder.axes)
    found = jax.jit(decoder.init, out_shardings=layout)(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
