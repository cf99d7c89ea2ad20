"""A vocabulary split over devices: the same embeddings and losses, and never all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config import schema
from glamcli.config.devices import Rules
from glamcli.model import layers
from glamcli.model.kernels import softmax
from glamcli.model.params import blueprint
from glamcli.parallel.axes import Layout
from glamcli.parallel.mesh import make_mesh

B, S, M, V = 8, 16, 8, 64
MODEL = schema.Model(
    num_layers=2,
    model_dim=M,
    ffn_dim=8,
    num_heads=8,
    head_dim=8,
    vocab_size=V,
    activation_dtype="float32",
)
MESHES = {
    "2D": schema.Mesh(data=2, expert=2, model=2),
    "sequence": schema.Mesh(data=2, model=4, residual="sequence"),
    "whole": schema.Mesh(slice=2, data=1, model=4, residual="whole"),
    "vocabulary over data": schema.Mesh(
        data=4, model=2, rules=Rules(vocab=("model",), embed=(), act_vocab=())
    ),
}


def example():
    keys = jax.random.split(jax.random.key(0), 4)
    x_BSM, weight_BS = jax.random.normal(keys[0], (B, S, M)), jax.random.uniform(keys[3], (B, S))
    table_VM = 2 * jax.random.normal(keys[1], (V, M))
    return x_BSM, table_VM, jax.random.randint(keys[2], (B, S), 0, V, jnp.int32), weight_BS


def equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_and_gradients_equal_those_of_one_device(mesh, chunks):
    x_BSM, table_VM, targets_BS, weight_BS = example()

    def loss(layout, bytes_per_device):
        def loss(x_BSM, table_VM):
            nats_BS, logz_BS = softmax.losses(
                x_BSM, table_VM, targets_BS, layout, chunk_bytes=bytes_per_device
            )
            return jnp.sum(weight_BS * (nats_BS + 0.1 * logz_BS**2))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    expected = loss(Layout.of(schema.Mesh()), 2**30)(x_BSM, table_VM)
    layout = Layout.of(mesh)
    with jax.set_mesh(make_mesh(mesh)):
        parts = layout.num_parts((B, S, V), softmax.LOGITS)
        found = loss(layout, B * S * V * 4 // parts // chunks)(x_BSM, table_VM)
    equal(found, expected)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_embeddings_and_their_gradient_equal_those_of_one_device(mesh):
    _, table_VM, tokens_BS, weight_BS = example()
    unknown_BS = tokens_BS.at[0, :3].set(jnp.array([-1, V, 3 * V], jnp.int32))

    def build(layout):
        embedding = blueprint(lambda rngs: layers.Embedding(rngs, MODEL, layout))

        def loss(table_VM):
            x_BSM = embedding.bind({"table": table_VM})(tokens_BS)
            return jnp.sum(weight_BS[..., None] * x_BSM**2)

        return jax.jit(
            lambda table: (embedding.bind({"table": table})(unknown_BS), jax.grad(loss)(table))
        )

    expected = build(Layout.of(schema.Mesh()))(table_VM)
    assert np.isnan(np.asarray(expected[0])[0, :3]).all()
    with jax.set_mesh(make_mesh(mesh)):
        found = build(Layout.of(mesh))(table_VM)
    equal(found, expected)


def test_no_device_ever_holds_all_logits_of_its_rows():
    mesh = schema.Mesh(data=2, model=4)
    layout, rows, tokens, width, vocab = Layout.of(mesh), 4, 64, 8, 8192
    chunk_bytes = 2**16

    def loss(x_BSM, table_VM, targets_BS):
        nats_BS, _ = softmax.losses(x_BSM, table_VM, targets_BS, layout, chunk_bytes=chunk_bytes)
        return jnp.sum(nats_BS)

    grid = make_mesh(mesh)
    args = (
        jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    )
    axes = (("batch", None, None), ("vocab", None), ("batch", None))
    with jax.set_mesh(grid):
        places = tuple(layout.sharding(grid, each) for each in axes)
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=places)
        compiled = grad.lower(*args).compile()
    # A quarter of the vocabulary for half of the rows, a few tokens at a time.
    assert compiled.memory_analysis().temp_size_in_bytes < rows * tokens * vocab * 4 // 2 // 4 // 2
    assert f"f32[{rows // 2},{tokens},{vocab // 4}]" not in compiled.as_text()
    assert f",{vocab}]" not in compiled.as_text()
