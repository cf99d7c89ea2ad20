"""Incremental decoding equals the full forward pass (what praxis leaves as a TODO for experts)."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config import schema
from glamcli.model import kv_cache
from glamcli.model.decoder import UNROLLED_LAYERS, Decoder
from glamcli.model.params import unstack_blocks

MODEL = schema.Model(
    num_layers=4,
    model_dim=16,
    ffn_dim=24,
    num_heads=2,
    head_dim=8,
    vocab_size=40,
    position_max_distance=20,
    position_buckets=8,
    activation_dtype="float32",
)
MOE = schema.Moe(num_experts=4, group_tokens=8)
B, S = 3, 24
TOKENS = np.array(np.random.default_rng(1).integers(0, 40, (B, S)), np.int32)


@lru_cache
def decoder_and_truth():
    decoder = Decoder(MODEL, MOE)
    params = jax.jit(decoder.init)(jax.random.key(0))
    ones = np.ones((B, S), np.int32)
    full, _ = jax.jit(lambda p: decoder.hidden(p, TOKENS, ones, dispatch="dropless"))(params)
    step = jax.jit(decoder.step)
    return decoder, params, step, np.asarray(full)


@pytest.mark.parametrize("chunks", [(S,), (7, 7, 10), (1,) * S], ids=["whole", "parts", "single"])
def test_any_split_into_steps_equals_the_full_pass(chunks):
    decoder, params, step, full = decoder_and_truth()
    state, found, done = decoder.init_cache(B, S), [], 0
    for size in chunks:
        x_BTM, state = step(params, state, TOKENS[:, done : done + size])
        found.append(np.asarray(x_BTM))
        done += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=1e-5)
    assert state["length"].tolist() == [S] * B


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)]
)
def test_a_model_so_deep_that_it_is_scanned_decodes_the_same(dtype, share):
    changes = {"num_layers": UNROLLED_LAYERS + 2, "activation_dtype": dtype}
    decoder = Decoder(MODEL.model_copy(update=changes), MOE)
    assert not decoder.is_shallow
    ones = np.ones((B, S), np.int32)

    @jax.jit
    def both(params):
        full, _ = decoder.hidden(params, TOKENS, ones, dispatch="dropless")
        state = decoder.init_cache(B, S)
        first, state = decoder.step(params, state, jnp.asarray(TOKENS[:, : S // 2]))
        second, state = decoder.step(params, state, jnp.asarray(TOKENS[:, S // 2 :]))
        return full, jnp.concatenate([first, second], axis=1)

    full, found = both(jax.jit(decoder.init)(jax.random.key(0)))
    assert full.dtype == found.dtype == jnp.dtype(dtype)
    full, found = (np.asarray(x, np.float32) for x in (full, found))
    np.testing.assert_allclose(found, full, atol=share * np.abs(full).max())


def test_blocks_that_are_apart_have_caches_of_their_own_and_decode_the_same():
    stacked, params, _, full = decoder_and_truth()
    decoder = replace(stacked, apart=True)
    params = unstack_blocks(params, stacked.num_blocks)

    @jax.jit
    def step(state, tokens_BT):
        return decoder.step(params, state, tokens_BT)

    _, state = step(decoder.init_cache(B, S), TOKENS[:, :7])
    assert len(state["layers"]) == decoder.num_blocks
    order = np.array([2, 2, 0], np.int32)
    state = kv_cache.select_rows(kv_cache.extended(state, 2), jnp.asarray(order))
    x_BTM, state = step(state, TOKENS[order, 7:14])
    np.testing.assert_allclose(np.asarray(x_BTM), full[order, 7:14], atol=1e-5)
    assert state["segments"].shape == (B, S + 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_padded_on_either_side_go_on_as_if_alone(side):
    decoder, params, step, full = decoder_and_truth()
    lengths, width = (10, 4, 7), 10
    prompt = np.zeros((B, width), np.int32)
    segments = np.zeros((B, width), np.int32)
    for b, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        prompt[b, where] = TOKENS[b, :length]
        segments[b, where] = 1
    state = decoder.init_cache(B, S)
    x_BTM, state = step(params, state, prompt, segments)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(x_BTM[b][segments[b] == 1], full[b, :length], atol=1e-5)
    for more in range(5):
        new = np.array([[TOKENS[b, length + more]] for b, length in enumerate(lengths)], np.int32)
        x_BTM, state = step(params, state, new)
        expected = np.stack([full[b, length + more] for b, length in enumerate(lengths)])
        np.testing.assert_allclose(np.asarray(x_BTM)[:, 0], expected, atol=1e-5)


def test_a_row_of_padding_stands_still():
    decoder, params, step, full = decoder_and_truth()
    state = decoder.init_cache(B, S)
    _, state = step(params, state, TOKENS[:, :7])
    waits = np.ones((B, 1), np.int32)
    waits[1] = 0
    _, state = step(params, state, TOKENS[:, 7:8], waits)
    assert state["length"].tolist() == [8, 7, 8]
    x_BTM, _ = step(
        params, state, np.stack([TOKENS[b, n : n + 1] for b, n in enumerate([8, 7, 8])])
    )
    np.testing.assert_allclose(np.asarray(x_BTM)[1, 0], full[1, 7], atol=1e-5)
    np.testing.assert_allclose(np.asarray(x_BTM)[0, 0], full[0, 8], atol=1e-5)


def test_selected_rows_go_on_from_their_new_place():
    decoder, params, step, full = decoder_and_truth()
    _, state = step(params, decoder.init_cache(B, S), TOKENS[:, :7])
    order = np.array([2, 2, 0], np.int32)
    x_BTM, _ = step(params, kv_cache.select_rows(state, jnp.asarray(order)), TOKENS[order, 7:8])
    np.testing.assert_allclose(np.asarray(x_BTM)[:, 0], full[order, 7], atol=1e-5)


def test_new_segments_do_not_see_old_ones():
    decoder, params, step, full = decoder_and_truth()
    _, state = step(params, decoder.init_cache(B, S), TOKENS[::-1, :7])
    x_BTM, _ = step(params, state, TOKENS[:, :7], np.full((B, 7), 2, np.int32))
    np.testing.assert_allclose(np.asarray(x_BTM), full[:, :7], atol=1e-5)


def test_nothing_is_written_past_the_end():
    kept = jnp.zeros((1, 4), jnp.int32)
    new = jnp.array([[1, 2, 3]], jnp.int32)
    assert kv_cache.insert(kept, new, jnp.array([2], jnp.int32)).tolist() == [[0, 0, 1, 2]]
