"""Matrix products counted before compiling."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from glamcli.plan.compile import matrix_flops

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16


def counted(run, *shapes) -> float:
    return matrix_flops(jax.jit(run).trace(*shapes).jaxpr, len(jax.devices()))


def test_products_are_counted_as_often_as_they_run():
    assert counted(jnp.matmul, X, W) == ONE

    def five(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    assert counted(five, X, W) == 5 * ONE
    loss = lambda x, w: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x))  # noqa: E731
    plain = lambda x, w: jnp.sum(jnp.sin(x @ w) @ w)  # noqa: E731
    assert counted(jax.grad(plain, (0, 1)), X, W) == 6 * ONE
    assert counted(jax.grad(loss, (0, 1)), X, W) >= 7 * ONE, "the forward pass runs again"


def test_a_mapped_function_counts_on_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    run = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert counted(run, X, W) == ONE


def test_a_kernel_counts_what_it_states_or_else_its_body_at_every_step():
    def body(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def product(x, w):
        half = pl.BlockSpec((4, 16), lambda row: (row, 0))
        whole = pl.BlockSpec((16, 16), lambda _: (0, 0))
        run = pl.pallas_call(body, X, grid=2, in_specs=[half, whole], out_specs=half, **stated)
        return run(x, w)

    stated = {}
    assert counted(product, X, W) == ONE
    stated["cost_estimate"] = pl.CostEstimate(flops=7, bytes_accessed=1, transcendentals=0)
    assert counted(lambda x, w: product(x, w), X, W) == 7


def test_a_ragged_product_counts_every_row_once_forward_and_backward():
    stacked = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert counted(jax.lax.ragged_dot, X, stacked, sizes) == ONE

    def loss(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes))

    assert counted(jax.grad(loss, (0, 1)), X, stacked, sizes) == 3 * ONE
