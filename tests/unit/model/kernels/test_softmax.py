import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.model.kernels import softmax

B, S, M, V = 2, 12, 8, 50


def example():
    keys = jax.random.split(jax.random.key(0), 3)
    x_BSM = jax.random.normal(keys[0], (B, S, M))
    table_VM = 2 * jax.random.normal(keys[1], (V, M))
    return x_BSM, table_VM, jax.random.randint(keys[2], (B, S), 0, V, jnp.int32)


def plain(x_BSM, table_VM, targets_BS):
    logits_BSV = jnp.einsum("BSM,VM->BSV", x_BSM, table_VM)
    logz_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    return logz_BS - jnp.take_along_axis(logits_BSV, targets_BS[..., None], -1)[..., 0], logz_BS


def total(function, targets_BS, weight_BS, z_coef=0.1):
    """A loss that uses both outputs, unlike for every token."""

    def loss(x_BSM, table_VM):
        nats_BS, logz_BS = function(x_BSM, table_VM, targets_BS)
        return jnp.sum(weight_BS * (nats_BS + z_coef * logz_BS**2))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_values_and_gradients_equal_the_plain_form(chunks):
    x_BSM, table_VM, targets_BS = example()
    weight_BS = jax.random.uniform(jax.random.key(3), (B, S))

    def chunked(x_BSM, table_VM, targets_BS):
        return softmax.losses(x_BSM, table_VM, targets_BS, chunk_bytes=B * S * V * 4 // chunks)

    assert softmax.num_chunks(B, S, V, B * S * V * 4 // chunks) == chunks
    found = total(chunked, targets_BS, weight_BS)(x_BSM, table_VM)
    expected = total(plain, targets_BS, weight_BS)(x_BSM, table_VM)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def test_chunks_are_the_fewest_equal_parts_that_fit():
    assert softmax.num_chunks(8, 256, 8192, 2**28) == 1
    assert softmax.num_chunks(1, 1000, 1, 4 * 350) == 4
    assert softmax.num_chunks(1, 7, 1000, 1) == 7


def test_large_vocabularies_never_hold_all_logits():
    rows, tokens, width, vocab = 4, 64, 8, 4096
    whole_bytes = rows * tokens * vocab * 4

    def loss(x_BSM, table_VM, targets_BS):
        nats_BS, _ = softmax.losses(x_BSM, table_VM, targets_BS, chunk_bytes=whole_bytes // 16)
        return jnp.sum(nats_BS)

    args = (
        jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < whole_bytes // 3


def test_bfloat16_states_give_float32_losses():
    x_BSM, table_VM, targets_BS = example()
    nats_BS, logz_BS = softmax.losses(x_BSM.astype(jnp.bfloat16), table_VM, targets_BS)
    assert nats_BS.dtype == logz_BS.dtype == jnp.float32
    expected, _ = plain(x_BSM, table_VM, targets_BS)
    np.testing.assert_allclose(np.asarray(nats_BS), np.asarray(expected), atol=0.2)
    grads = jax.grad(lambda x, t: jnp.sum(softmax.losses(x, t, targets_BS)[0]), argnums=(0, 1))(
        x_BSM.astype(jnp.bfloat16), table_VM
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
