"""The Pallas kernels of attention: interpreted, and compiled for chips that are only described."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glamcli import libtpu
from glamcli.config import schema
from glamcli.config.chips import load_chips
from glamcli.config.sizes import flash_block
from glamcli.model import attention
from glamcli.model.attention import Attention
from glamcli.model.kernels.attention import KEPT, attend
from glamcli.model.kernels.flash_attention import flash_attention
from glamcli.model.params import blueprint
from glamcli.model.position import RelativeBias
from glamcli.parallel.axes import GLAM
from glamcli.parallel.mesh import make_mesh
from glamcli.plan import topology

# One document and padding; documents shorter and longer than a block; one whole row.
SEGMENTS = np.repeat([[1, 1, 1, 0], [1, 2, 2, 3], [5, 5, 5, 5]], 96, axis=1).astype(np.int32)
BLOCK = 128
SIZES = {"num_layers": 1, "model_dim": 128, "ffn_dim": 8, "vocab_size": 8}


def operands(heads, head_dim, dtype, segments):
    B, S = segments.shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (B, S, heads, head_dim)) for key in keys[:3])
    arrays = [x.astype(dtype) for x in (q * head_dim**-0.5, k, v)]
    return arrays, jax.random.normal(keys[3], (heads, 32)), jax.random.normal(keys[4], q.shape)


def gradient(core, arrays, table, pull):
    """The result and its gradients of queries, keys, values and the table of biases."""

    def loss(q, k, v, table):
        a = core(q, k, v, table).astype(jnp.float32)
        return jnp.sum(a * pull), a

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays, table)


def by_kernel(q, k, v, table, segments, zero_logit, layout=GLAM):
    bias = RelativeBias(nnx.Rngs(0), table.shape[0], 32, 128)
    X = layout.num_parts((q.shape[0],), ("batch",))
    band = bias.band(jnp.broadcast_to(table, (X, *table.shape)), BLOCK)
    return flash_attention(q, k, v, band, segments, zero_logit=zero_logit, layout=layout)


def by_logits(q, k, v, table, segments, zero_logit):
    S = segments.shape[1]
    bias = RelativeBias(nnx.Rngs(0), table.shape[0], 32, 128).of(table[None], S, S)
    mask = jnp.equal(segments[:, :, None], segments[:, None, :]) & jnp.tri(S, dtype=bool)[None]
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return attend(*wide, bias, mask, zero_logit=zero_logit)


def assert_near(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("heads", "head_dim", "zero_logit", "dtype", "tolerance"),
    [
        (1, 128, True, jnp.float32, 1e-5),
        (2, 64, False, jnp.float32, 1e-5),
        # Weights and gradients of logits are rounded to 8 bits before their products.
        (2, 64, True, jnp.bfloat16, 0.02),
    ],
)
def test_the_kernel_equals_all_logits_with_gradients(heads, head_dim, zero_logit, dtype, tolerance):
    arrays, table, pull = operands(heads, head_dim, dtype, SEGMENTS)
    settings = {"segments": jnp.asarray(SEGMENTS), "zero_logit": zero_logit}
    found = gradient(partial(by_kernel, **settings), arrays, table, pull)
    expected = gradient(partial(by_logits, **settings), arrays, table, pull)
    assert_near(found, expected, tolerance)


def test_every_device_has_its_rows_and_heads():
    segments = jnp.asarray(np.repeat(SEGMENTS[:2, 64:192], 2, axis=0))
    arrays, table, pull = operands(2, 128, jnp.float32, segments)
    settings = {"segments": segments, "zero_logit": True}
    expected = gradient(partial(by_logits, **settings), arrays, table, pull)
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    with jax.set_mesh(mesh):
        rows = GLAM.sharding(mesh, ("batch", None, "act_heads", None))
        arrays = [jax.device_put(x, rows) for x in arrays]
        found = gradient(partial(by_kernel, **settings), arrays, table, pull)
    assert_near(found, expected, 1e-5)


def test_rows_and_heads_that_do_not_fit_stay_with_xla():
    def block(tokens, heads=2, **changes):
        sizes = SIZES | {"num_heads": 8, "head_dim": 64} | changes
        return flash_block(schema.Model(**sizes), tokens, heads)

    assert block(1024) == block(2048) == 256
    assert block(128) == block(384) == 128
    assert block(64) is block(1000) is block(4096) is block(1024, heads=1) is None
    assert block(1024, heads=1, head_dim=128) == 256
    assert block(1024, position_max_distance=300) == 512
    assert block(384, position_max_distance=300) is None
    assert block(1024, position_max_distance=600) is block(1024, head_dim=32) is None


def layer(kind):
    model = schema.Model(**SIZES, num_heads=4, head_dim=64, attention=kind)
    return blueprint(lambda rngs: Attention(rngs, model))


def traced(plan, tokens):
    x = jax.ShapeDtypeStruct((2, tokens, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
    return str(jax.make_jaxpr(lambda p, x, s: plan.bind(p)(x, s))(plan.shapes, x, segments))


@pytest.mark.parametrize("kind", ["auto", "pallas"])
def test_the_kernel_is_for_tpus_and_rows_that_fit(kind, monkeypatch):
    assert "pallas_call" not in traced(layer(kind), 256)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert "pallas_call" in traced(layer(kind), 256)
    assert "pallas_call" not in traced(layer(kind), 100)
    assert "pallas_call" not in traced(layer("xla"), 256)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# jax keeps what it compiled for devices that are only described, and cannot read it again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize(("target", "head_dim"), [("v4-8", 128), ("v5e-4", 64)])
def test_one_layer_compiles_for_described_tpus_without_logits(target, head_dim):
    libtpu.quiet()
    devices = topology.devices(topology.parse_target(target, load_chips()))
    model = schema.Model(**SIZES, num_heads=4, head_dim=head_dim, attention="pallas")
    plan = blueprint(lambda rngs: Attention(rngs, model))

    keep = jax.checkpoint_policies.save_only_these_names(KEPT)

    @partial(jax.checkpoint, policy=keep)
    def loss(params, x, segments):
        return jnp.sum(plan.bind(params)(x, segments).astype(jnp.float32))

    x = jax.ShapeDtypeStruct((4, 512, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
    with jax.set_mesh(make_mesh(schema.Mesh(data=2, model=2), devices)):
        compiled = jax.jit(jax.grad(loss)).lower(plan.shapes, x, segments).compile()
    text = compiled.as_text()
    kernels = re.findall(r"%(\S*attention_(?:forward|backward)\S*) = ", text)
    assert len(kernels) == 2, "one forward, whose results are kept, one backward"
    assert "512,512]" not in text
