import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from glamcli.config import schema
from glamcli.model.decoder import UNROLLED_LAYERS, Decoder
from glamcli.model.experts import Routing
from glamcli.model.params import unstack_blocks
from unit.model import decoder_reference

SIZES = {
    "num_layers": UNROLLED_LAYERS + 2,
    "model_dim": 16,
    "ffn_dim": 24,
    "num_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "activation_dtype": "float32",
}
MOE = schema.Moe(num_experts=4, group_tokens=20, capacity_factor=1.0)
SEGMENTS = np.array([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3], np.int32)
TOKENS = np.array(np.random.default_rng(0).integers(0, 40, SEGMENTS.shape), np.int32)


@lru_cache
def built(experts: bool):
    """A decoder, with or without experts, and parameters with norm scales away from one."""
    decoder = Decoder(schema.Model(**SIZES), MOE if experts else None)

    def init(key):
        params = decoder.init(key)
        scale = jnp.linspace(0.5, 1.5, SIZES["model_dim"])
        params["final_norm"]["scale"] = scale
        params["blocks"]["dense_layer"]["ffn_norm"]["scale"] *= scale[None]
        return params

    return decoder, jax.jit(init)(jax.random.key(0))


def loss(decoder, params, dispatch=None):
    """A loss with a gradient for every parameter, the router included; and the statistics."""
    x_BSM, stats = decoder.hidden(params, TOKENS, SEGMENTS, dispatch=dispatch)
    nats_BS, logz_BS = decoder.losses(params, x_BSM, TOKENS)
    total = jnp.sum(jnp.where(SEGMENTS != 0, nats_BS + 1e-2 * logz_BS**2, 0.0))
    return total + jnp.sum(stats.get("balance_loss", jnp.zeros(()))), stats


def assert_close(a, b, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance), a, b
    )


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_equals_loops_in_float64(experts):
    decoder, params = built(experts)
    hidden = jax.jit(lambda p: decoder.hidden(p, TOKENS, SEGMENTS, dispatch="dropless")[0])
    found = np.asarray(hidden(params))
    wide = decoder_reference.float64(params)
    for tokens, segments, x_SM in zip(TOKENS, SEGMENTS, found, strict=True):
        expected = decoder_reference.hidden(wide, tokens, segments, decoder.model, decoder.moe)
        np.testing.assert_allclose(x_SM[segments != 0], expected[segments != 0], atol=1e-5)


def apart(decoder, params):
    """The same loss with arrays of its own for every block, and no scan."""
    params = unstack_blocks(params, decoder.num_blocks)
    return loss(dataclasses.replace(decoder, apart=True), params, "gather")


def gradient(function, params):
    return jax.jit(jax.value_and_grad(function, has_aux=True))(params)


@pytest.mark.slow
def test_scanned_equals_blocks_apart():
    decoder, params = built(True)
    expected = gradient(lambda p: apart(decoder, p), params)
    assert expected[0][1]["wanted_E"].shape == (3, 4)
    remat = dataclasses.replace(decoder, remat="full")
    found = gradient(lambda p: loss(remat, p, "gather"), params)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["attention", "dots", "projections", "full"])
def test_recomputing_changes_no_gradient(remat):
    decoder, params = built(False)
    other = dataclasses.replace(decoder, remat=remat)
    found = gradient(lambda p: loss(other, p), params)
    assert_close(found, gradient(lambda p: loss(decoder, p), params), rtol=1e-4, atol=1e-5)


def test_full_remat_keeps_less_for_the_backward_pass_than_none():
    kept = {}
    for remat in ("none", "attention", "dots", "projections", "full"):
        decoder = Decoder(schema.Model(**(SIZES | {"num_layers": 8})), None, remat)
        _, pullback = jax.eval_shape(
            lambda p, decoder=decoder: jax.vjp(lambda p: loss(decoder, p)[0], p), decoder.shapes
        )
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept["full"] < kept["projections"] < kept["dots"] < kept["attention"] < kept["none"]


def products(jaxpr):
    """Matrix products of a program, those of the programs inside it included."""
    inner = [each for eqn in jaxpr.eqns for each in jaxprs_in_params(eqn.params)]
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(map(products, inner))


def test_dots_computes_no_matrix_product_again():
    decoder, params = built(True)
    other = dataclasses.replace(decoder, remat="dots")
    made = [
        products(jax.make_jaxpr(jax.grad(lambda p, each=each: loss(each, p, "gather")[0]))(params))
        for each in (decoder, other)
    ]
    assert made[0] == made[1]


def test_kept_projections_are_not_computed_again():
    decoder, params = built(False)
    made = {}
    for remat in ("full", "projections"):
        other = dataclasses.replace(decoder, remat=remat)
        grad = jax.grad(lambda p, other=other: loss(other, p)[0])
        made[remat] = products(jax.make_jaxpr(grad)(params))
    assert made["full"] - made["projections"] == 3, "queries, keys and values"


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_hidden_states_have_no_gradient_from_later_tokens_or_other_segments(experts):
    decoder, params = built(experts)
    table_BSM = params["embedding"]["table"][TOKENS]

    def hidden(x_BSM):
        (x_BSM, _) = jax.lax.scan(
            lambda x, p: (
                decoder._blocks.bind(p)(x, jnp.asarray(SEGMENTS), Routing("dropless", None))[0],
                None,
            ),
            x_BSM,
            params["blocks"],
        )
        return decoder._finish(params, x_BSM)

    def row(place):
        """d sum(hidden[b, s]) / d x, as one number per token."""
        gradient = jax.grad(lambda x: jnp.sum(hidden(x)[place[0], place[1]]))(table_BSM)
        return jnp.sum(jnp.abs(gradient), axis=-1)

    B, S = TOKENS.shape
    places = np.indices((B, S), np.int32).reshape(2, -1).T
    depends = np.asarray(jax.jit(lambda p: jax.lax.map(row, p))(places)).reshape(B, S, B, S)
    for b in range(B):
        for s in np.flatnonzero(SEGMENTS[b]):
            seen = np.zeros((B, S), bool)
            seen[b, : s + 1] = SEGMENTS[b, : s + 1] == SEGMENTS[b, s]
            assert (depends[b, s][~seen] == 0).all()
            assert (depends[b, s][seen] > 0).all()


def test_what_stands_in_padding_changes_nothing():
    decoder, params = built(True)
    other = np.where(SEGMENTS == 0, 7, TOKENS).astype(np.int32)
    run = jax.jit(lambda tokens: decoder.hidden(params, tokens, SEGMENTS, dispatch="gather"))
    (x_a, stats_a), (x_b, stats_b) = run(TOKENS), run(other)
    np.testing.assert_array_equal(np.asarray(x_a)[SEGMENTS != 0], np.asarray(x_b)[SEGMENTS != 0])
    assert_close(stats_a, stats_b, rtol=0)


def test_bfloat16_activations_over_float32_weights():
    decoder, params = built(False)
    half = Decoder(decoder.model.model_copy(update={"activation_dtype": "bfloat16"}))
    (value, _), grads = jax.jit(jax.value_and_grad(lambda p: loss(half, p), has_aux=True))(params)
    hidden = jax.eval_shape(lambda p: half.hidden(p, TOKENS, SEGMENTS)[0], params)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(value, jax.jit(lambda p: loss(decoder, p)[0])(params), rtol=2e-2)


def test_logits_and_losses_agree():
    decoder, params = built(False)

    @jax.jit
    def both(params):
        x_BSM, stats = decoder.hidden(params, TOKENS, SEGMENTS)
        assert stats == {}
        logp_BSV = jax.nn.log_softmax(decoder.logits(params, x_BSM), axis=-1)
        return logp_BSV, decoder.losses(params, x_BSM, TOKENS)[0]

    logp_BSV, nats_BS = (np.asarray(x) for x in both(params))
    expected_BS = -np.take_along_axis(logp_BSV, TOKENS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats_BS, expected_BS, rtol=1e-5, atol=1e-6)


def test_shapes_axes_and_parameters_are_one_tree():
    decoder, params = built(True)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, decoder.shapes)
    jax.tree.map(
        lambda shape, axes: (len(shape.shape) == len(axes)) or pytest.fail(f"{shape} {axes}"),
        decoder.shapes,
        decoder.axes,
    )
    assert hash(decoder) == hash(Decoder(schema.Model(**SIZES), MOE))


PAPER = {  # L, M, H, N, D, E, V: parameters (GLaM table 4 with a vocabulary that fits it)
    "0.1B": (12, 768, 3072, 12, 64, 0, 32000, 137_846_016),
    "0.1B/16E": (12, 768, 3072, 12, 64, 16, 32000, 548_437_248),
    "0.1B/32E": (12, 768, 3072, 12, 64, 32, 32000, 1_001_495_808),
    "0.1B/64E": (12, 768, 3072, 12, 64, 64, 32000, 1_907_612_928),
    "0.1B/128E": (12, 768, 3072, 12, 64, 128, 32000, 3_719_847_168),
    "1.7B": (24, 2048, 8192, 16, 128, 0, 32000, 1_676_261_376),
    "1.7B/32E": (24, 2048, 8192, 16, 128, 32, 32000, 13_957_969_920),
    "1.7B/64E": (24, 2048, 8192, 16, 128, 64, 32000, 26_843_658_240),
    "1.7B/128E": (24, 2048, 8192, 16, 128, 128, 32000, 52_615_034_880),
    "1.7B/256E": (24, 2048, 8192, 16, 128, 256, 32000, 104_157_788_160),
    "8B": (32, 4096, 16384, 32, 128, 0, 32000, 8_721_305_600),
    "8B/64E": (32, 4096, 16384, 32, 128, 64, 32000, 142_943_227_904),
    "137B": (64, 8192, 65536, 128, 128, 0, 32000, 137_702_416_384),
    "64B/64E": (64, 8192, 32768, 128, 128, 64, 256000, 1_161_756_418_048),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_sizes_have_their_parameters_without_any_memory(name):
    L, M, H, N, D, E, V, expected = PAPER[name]
    model = schema.Model(
        num_layers=L, model_dim=M, ffn_dim=H, num_heads=N, head_dim=D, vocab_size=V
    )
    decoder = Decoder(model, schema.Moe(num_experts=E) if E else None)
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder.shapes)) == expected


def test_experts_need_pairs_of_layers():
    odd = Decoder(schema.Model(**(SIZES | {"num_layers": 3})), MOE)
    with pytest.raises(ValueError, match="pairs"):
        odd.init(jax.random.key(0))
    assert Decoder(schema.Model(**(SIZES | {"num_layers": 3}))).num_blocks == 3


def test_drawn_second_experts_follow_the_key_and_differ_by_layer():
    decoder = Decoder(schema.Model(**SIZES), MOE.model_copy(update={"second_policy": "sampling"}))
    _, params = built(True)
    params = jax.tree.map(lambda x: x, params)
    # With equal probabilities, how many tokens get which second expert is up to the draw alone.
    params["blocks"]["expert_layer"]["ffn"]["router"] *= 0.0
    run = jax.jit(
        lambda key: decoder.hidden(params, TOKENS, SEGMENTS, dispatch="dropless", key=key)
    )
    (first, drawn), (again, _), (other, drawn_otherwise) = (
        run(jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).max() > 1e-4
    # Two draws of a layer may give the same counts by chance: both keys together hardly do.
    loads = np.concatenate([drawn["wanted_E"], drawn_otherwise["wanted_E"]], axis=1)
    assert len({tuple(load) for load in loads}) == 3, "every layer draws for itself"


def test_evaluation_has_a_capacity_of_its_own():
    # One group of 20 tokens for 4 experts: 8 slots each in training, 20 in evaluation.
    moe = MOE.model_copy(update={"eval_dispatch": "gather", "eval_capacity_factor": 4.0})
    decoder = Decoder(schema.Model(**(SIZES | {"num_layers": 2})), moe)
    ones = jnp.ones_like(SEGMENTS)

    @jax.jit
    def run(key):
        params = decoder.init(key)
        params["blocks"]["expert_layer"]["ffn"]["router"] *= 50.0  # so that some experts are full
        trained, stats = decoder.hidden(params, TOKENS, ones)
        scored, scoring_stats = decoder.hidden(params, TOKENS, ones, dispatch="gather")
        everyone, _ = decoder.hidden(params, TOKENS, ones, dispatch="dropless")
        decoded, _ = decoder.step(params, decoder.init_cache(2, 10), jnp.asarray(TOKENS), ones)
        dropped = stats["dropped_frac"], scoring_stats["dropped_frac"]
        return trained, scored, everyone, decoded, dropped

    trained, scored, everyone, decoded, dropped = run(jax.random.key(0))
    assert dropped[0] > 0
    assert dropped[1] == 0
    assert_close(scored, everyone, atol=1e-5)
    assert_close(decoded, everyone, atol=1e-5)
    assert np.abs(np.asarray(trained) - np.asarray(everyone)).max() > 1e-3
