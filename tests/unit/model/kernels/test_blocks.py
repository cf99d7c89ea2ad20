"""The kernels for blocks of rows: interpreted on this CPU, and compiled for TPUs."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from glamcli import libtpu
from glamcli.config import schema
from glamcli.config.chips import load_chips
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.kernels import blocks, experts
from glamcli.model.kernels.activation import activate, keep
from glamcli.model.params import blueprint
from glamcli.parallel.axes import GLAM
from glamcli.parallel.mesh import make_mesh
from glamcli.plan import topology

ROWS = 8


def case(sizes, M, H, dtype):
    """x [Q, M], both weights, the experts of the blocks, how many are used, and a gradient."""
    rng = np.random.default_rng(0)
    E = len(sizes)
    of_block = [e for e, size in enumerate(sizes) for _ in range(-(-size // ROWS))]
    filled = [np.arange(-(-size // ROWS) * ROWS) < size for size in sizes]
    num = len(of_block)
    of_block += [E - 1] * 2  # not used
    filled_Q1 = np.concatenate([*filled, np.zeros(2 * ROWS, bool)])[:, None]
    x_QM, dout_QM = rng.normal(size=(2, len(filled_Q1), M)) * filled_Q1
    w_in, w_out = rng.normal(size=(2, E, M, H)) / np.sqrt([[[[M]]], [[[H]]]])
    rows = [jnp.asarray(a, dtype) for a in (x_QM, dout_QM)]
    weights = [jnp.asarray(w, jnp.float32) for w in (w_in, w_out)]
    return rows[0], *weights, jnp.asarray(of_block, jnp.int32), jnp.int32(num), rows[1]


def dense(act, x_QM, w_in_EMH, w_out_EMH, of_block, num):
    """Every row by every expert, with JAX's own gradients."""
    of_row_Q = jnp.where(jnp.arange(len(x_QM)) < num * ROWS, jnp.repeat(of_block, ROWS), -1)
    own_QE = jax.nn.one_hot(of_row_Q, len(w_in_EMH))
    h_QEH = activate(act, keep(act, jnp.einsum("QM,EMH->QEH", x_QM, w_in_EMH)))
    return jnp.einsum("QEH,EMH,QE->QM", h_QEH, w_out_EMH, own_QE)


def output_and_gradients(run, x_QM, w_in_EMH, w_out_EMH, of_block, num, dout_QM):
    def call(*arrays):
        return run(*arrays, of_block, num)

    y_QM, pull = jax.vjp(call, x_QM, w_in_EMH, w_out_EMH)
    return y_QM, *pull(dout_QM)


def assert_close(found, expected, tolerance):
    """Within a part of the largest, and zero where all of it is."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


MIXED, ONE, NONE = (3, 0, 17, 8), (0, 20, 0), (0, 0)
MANY = 99
"""Expecting so many blocks, the kernels have weights rounded beforehand."""
CASES = [
    (MIXED, (256, 640), 1, "relu", "float32"),  # several tiles of every dimension
    (MIXED, (128, 256), MANY, "gelu", "float32"),
    (ONE, (128, 256), 1, "gelu", "bfloat16"),
    (ONE, (6, 10), MANY, "relu", "bfloat16"),  # no whole lanes
    (NONE, (128, 128), 1, "relu", "float32"),
]


@pytest.mark.parametrize(("sizes", "widths", "expected", "act", "dtype"), CASES)
def test_the_kernels_are_the_loop_and_the_dense_product(sizes, widths, expected, act, dtype):
    arrays = case(sizes, *widths, dtype)

    def run(form):
        return jax.jit(functools.partial(output_and_gradients, form))(*arrays)

    found = run(functools.partial(blocks.on_blocks, act, expected))
    # One rounding of bfloat16: XLA rounds inside gelu as well, the kernels after it.
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    whole = jnp.full_like(arrays[3], ROWS)

    def loop(*args):
        return experts._blocked(*args[:4], whole, args[4], act)

    assert_close(found, run(loop), tolerance)
    if dtype == "float32":
        assert_close(found, run(functools.partial(dense, act)), 1e-6)
    num_used = int(arrays[4]) * ROWS
    assert not np.any(found[0][num_used:])
    assert not np.any(found[1][num_used:])


WIDE = schema.Model(
    num_layers=2,
    model_dim=128,
    ffn_dim=256,
    num_heads=1,
    head_dim=8,
    vocab_size=8,
)


def layer_of(dropless_experts, model=WIDE):
    moe = schema.Moe(num_experts=4, group_tokens=16, dropless_experts=dropless_experts)
    return blueprint(lambda rngs: MoeLayer(rngs, model, moe))


def loss(plan, params, x_BSM):
    y_BSM = plan.bind(params)(x_BSM, jnp.ones(x_BSM.shape[:2], bool), Routing("dropless"))[0]
    return jnp.sum(y_BSM.astype(jnp.float32) ** 2)


def test_a_layer_over_two_dimensions_runs_the_kernels_on_every_device(monkeypatch):
    x_BSM = jax.random.normal(jax.random.key(1), (8, 16, 128))
    params = layer_of("loop").init(jax.random.key(0))
    expected = jax.jit(jax.grad(functools.partial(loss, layer_of("loop"))))(params, x_BSM)
    monkeypatch.setattr(experts, "platform", lambda: "tpu")  # the kernels know that it is not
    gradients = jax.jit(jax.grad(functools.partial(loss, layer_of("pallas"))))
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    with jax.set_mesh(mesh):
        x_BSM = jax.device_put(x_BSM, GLAM.sharding(mesh, ("batch", None, None)))
        traced = gradients.trace(params, x_BSM)
        assert "experts_products" in str(traced.jaxpr)
        found = traced.lower().compile()(params, x_BSM)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-5)


def test_the_loop_runs_where_the_kernels_cannot(monkeypatch):
    def program(**widths):
        plan = layer_of("pallas", WIDE.model_copy(update=widths))
        x_BSM = jnp.zeros((1, 16, plan.shapes["w_in"].shape[1]))
        return str(jax.make_jaxpr(functools.partial(loss, plan))(plan.shapes, x_BSM))

    assert "pallas_call" not in program()  # this is a CPU
    monkeypatch.setattr(experts, "platform", lambda: "tpu")
    assert "pallas_call" in program()
    assert "pallas_call" not in program(ffn_dim=192)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("name", ["v4-8", "v5e-4"])
def test_the_largest_tiles_compile_for_a_tpu(name):
    libtpu.quiet()
    device = topology.devices(topology.parse_target(name, load_chips()))[0]
    place = SingleDeviceSharding(device)

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = struct(1024, 2048)
    weights = [struct(2, 2048, 2048, dtype=jnp.float32)] * 2
    numbers = struct(2, dtype=jnp.int32), struct(dtype=jnp.int32)
    run = functools.partial(output_and_gradients, functools.partial(blocks.on_blocks, "gelu", 2))
    with jax.set_mesh(jax.sharding.Mesh([device], ("data",))):
        program = jax.jit(run).lower(rows, *weights, *numbers, rows).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 6
    costs = program.cost_analysis()
    assert costs["flops"] == pytest.approx(6 * 2 * 1024 * 2048 * 2048, rel=0.01)
