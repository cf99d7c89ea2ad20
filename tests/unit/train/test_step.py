"""The train step: exact accumulation, per-source sums, bad gradients, randomness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config.schema import Batch, Data, Loss, Model, Moe, Optimizer, Recipe, Train
from glamcli.model.decoder import UNROLLED_LAYERS, Decoder
from glamcli.train.state import abstract_state, init_state
from glamcli.train.step import _loss_sums, make_heldout_step, make_train_step, update

MODEL = Model(
    num_layers=2,
    model_dim=16,
    ffn_dim=32,
    num_heads=2,
    head_dim=8,
    vocab_size=64,
    activation_dtype="float32",
)
ROWS, ROW_TOKENS = 8, 16
DECODER = Decoder(MODEL, Moe(num_experts=4))
# Plain momentum after one step is a tenth of the gradient: what the tests compare.
ADAMW = Optimizer(name="adamw", beta1=0.9, learning_rate=1e-3)
NAN_TARGET, INF_TARGET = 62, 63


class Poisoned(Decoder):
    """A decoder whose loss, hence gradient, is not finite at two particular targets."""

    def losses(self, params, x_BSM, targets_BS):
        nats_BS, logz_BS = super().losses(params, x_BSM, targets_BS)
        poison_BS = jnp.where(targets_BS == NAN_TARGET, jnp.nan, 1.0)
        poison_BS = jnp.where(targets_BS == INF_TARGET, jnp.inf, poison_BS)
        return nats_BS * poison_BS, logz_BS


def recipe(accumulate=1, loss=None, optimizer=ADAMW, **moe):
    return Recipe(
        seed=3,
        model=MODEL,
        moe=Moe(num_experts=4, group_tokens=8, router_z_coef=0.1, **moe),
        batch=Batch(rows=ROWS, row_tokens=ROW_TOKENS, accumulate=accumulate),
        optimizer=optimizer,
        loss=loss or Loss(),
        train=Train(steps=10, remat="none"),
        data=Data(mixture="quickstart"),
    )


def padded_batch(seed=0):
    """Rows with documents and padding of every length, some of them empty."""
    rng = np.random.default_rng(seed)
    real = rng.integers(0, ROW_TOKENS + 1, ROWS)
    real[:2] = 0, ROW_TOKENS
    at = np.arange(ROW_TOKENS)[None]
    segments = np.where(at < real[:, None] // 2, 1, np.where(at < real[:, None], 2, 0))
    tokens, targets = rng.integers(3, 60, (2, ROWS, ROW_TOKENS)) * (segments > 0)
    source = rng.integers(0, 3, ROWS)
    batch = {"tokens": tokens, "targets": targets, "segments": segments, "source": source}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


POISONABLE = recipe(
    2,
    optimizer=Optimizer(factored_min_dim=8),
    dispatch="dropless",
    second_policy="random",
    second_threshold=1.0,
)


@functools.cache
def compiled(recipe_json, kind):
    asked = Recipe.model_validate_json(recipe_json)
    return jax.jit(make_train_step(kind(asked.model, asked.moe), asked, num_sources=3))


@functools.cache
def first_state(settings):
    return init_state(DECODER, settings, seed=3)


def program(asked, kind=Decoder):
    """The compiled step and its first state."""
    return compiled(asked.model_dump_json(), kind), first_state(asked.optimizer)


def run(asked, batch):
    step, state = program(asked)
    return step(state, batch)


def gradient(state):
    return {
        jax.tree_util.keystr(path): np.asarray(slot) * 10
        for path, slot in jax.tree_util.tree_leaves_with_path(state.opt_state["slots"])
        if path[-1].key == "m"
    }


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"dispatch": "dropless", "balance_coef": 1.0},
        pytest.param(
            {
                "dispatch": "gather",
                "balance_coef": 1.0,
                "balance_padding": "legacy",
                "balance_over_layers": "mean",
                "loss": Loss(denominator="positions", z_coef=0.1),
            },
        ),
    ],
    ids=["dropless", "capacity"],
)
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(settings):
    batch = padded_batch()
    whole, whole_sums = run(recipe(1, **settings), batch)
    parts, part_sums = run(recipe(4, **settings), batch)
    for name, want in gradient(whole).items():
        np.testing.assert_allclose(
            gradient(parts)[name], want, rtol=1e-4, atol=2e-6 * np.abs(want).max(), err_msg=name
        )
    routing, part_routing = whole_sums.pop("routing"), part_sums.pop("routing")
    exact = ("balance_loss", "router_z_loss", "served_3", "router_entropy_nats", "dropped_frac")
    for sums, other, names in (
        (whole_sums, part_sums, whole_sums),
        (routing, part_routing, exact),
    ):
        for name in names:
            np.testing.assert_allclose(other[name], sums[name], rtol=2e-5, err_msg=name)


def loss_of_four_layers(over_layers, denominator):
    """A step's sums with two expert layers, so that their sum is not their mean."""
    moe = {"dispatch": "dropless", "balance_coef": 1.0, "balance_over_layers": over_layers}
    asked = recipe(1, Loss(denominator=denominator, z_coef=0.5), **moe)
    asked = asked.model_copy(update={"model": MODEL.model_copy(update={"num_layers": 4})})
    decoder = Decoder(asked.model, asked.moe)
    step = jax.jit(make_train_step(decoder, asked, num_sources=3))
    return step(init_state(decoder, ADAMW, seed=3), padded_batch())[1]


@pytest.mark.parametrize(
    ("over_layers", "denominator"),
    [pytest.param("sum", "positions", marks=pytest.mark.slow), ("mean", "targets")],
)
def test_the_loss_is_the_stated_formula(over_layers, denominator):
    sums = loss_of_four_layers(over_layers, denominator)
    num = int(np.sum(np.asarray(padded_batch()["segments"]) > 0))
    assert int(sums["num_targets"]) == num < ROWS * ROW_TOKENS
    total = {"sum": np.sum, "mean": np.mean}[over_layers]
    want = sums["loss_nats"] + 0.5 * sums["z_sum"]
    want = want / {"targets": num, "positions": ROWS * ROW_TOKENS}[denominator]
    assert sums["routing"]["balance_loss"].shape == (2,)
    want += total(sums["routing"]["balance_loss"])
    want += 0.1 * total(sums["routing"]["router_z_loss"])
    assert float(sums["loss"]) == pytest.approx(float(want), rel=1e-5)


def test_the_z_loss_takes_the_squares_of_real_targets():
    batch = padded_batch()
    nats_BS, logz_BS = np.random.default_rng(1).normal(4, 1, (2, ROWS, ROW_TOKENS))
    sums = _loss_sums(jnp.float32(nats_BS), jnp.float32(logz_BS), batch, 3)
    real_BS = np.asarray(batch["segments"]) != 0
    np.testing.assert_allclose(sums["z_sum"], (logz_BS[real_BS] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss_nats"], nats_BS[real_BS].sum(), rtol=1e-5)


def test_every_source_gets_its_own_loss_and_padding_counts_for_nothing():
    asked = recipe()
    params = first_state(ADAMW).params
    step = jax.jit(make_heldout_step(DECODER, asked, num_sources=3))
    batch = padded_batch()
    sums = step(params, batch)
    for source in range(3):
        mine = {k: np.asarray(x).copy() for k, x in batch.items()}
        mine["segments"][mine["source"] != source] = 0
        mine["tokens"][mine["segments"] == 0] = 61  # must not matter
        mine["targets"][mine["segments"] == 0] = 61
        alone = step(params, mine)
        assert float(alone["loss_nats"]) == pytest.approx(float(sums["source_nats"][source]), 1e-5)
        assert int(alone["num_targets"]) == int(sums["source_targets"][source])
    assert float(jnp.sum(sums["source_nats"])) == pytest.approx(float(sums["loss_nats"]), 1e-6)
    mean = float(sums["loss_nats"]) / int(sums["num_targets"])
    assert mean == pytest.approx(np.log(64), abs=0.5)


def test_a_bad_part_leaves_every_bit_and_the_next_steps_train_on():
    step, state = program(POISONABLE, Poisoned)
    good = padded_batch()
    first, _ = step(state, good)
    for target in (NAN_TARGET, INF_TARGET):
        bad = {k: np.asarray(x).copy() for k, x in good.items()}
        bad["targets"][-1, 0], bad["segments"][-1, 0] = target, 1  # in the last part only
        second, sums = step(first, bad)
        assert_same_bits((second.params, second.opt_state), (first.params, first.opt_state))
        assert not bool(sums["finite"])
        assert (int(second.step), int(second.bad_steps), int(second.bad_steps_total)) == (2, 1, 1)
    third, sums = step(second, good)
    assert bool(sums["finite"])
    assert (int(third.step), int(third.bad_steps), int(third.bad_steps_total)) == (3, 0, 1)
    assert int(third.opt_state["count"]) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(third.params))
    without, _ = step(first._replace(step=jnp.int32(2)), good)
    assert_same_bits(third.params, without.params)


@functools.cache
def updated(settings):
    """The compiled update of a state by a gradient."""
    asked = recipe(optimizer=settings)
    return jax.jit(functools.partial(update, DECODER, asked))


@pytest.mark.parametrize("settings", [POISONABLE.optimizer, ADAMW], ids=["adafactor", "adamw"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_number_in_a_gradient_changes_no_bit(settings, bad):
    """1e30 is one: the gradient's norm overflows."""
    state = first_state(settings)
    grads = jax.tree.map(lambda p: np.full(p.shape, 1e-3, np.float32), state.params)
    state, sums = updated(settings)(state, grads, jnp.float32(4.0))
    assert sums["finite"]
    grads["embedding"]["table"][5, 3] = bad
    after, sums = updated(settings)(state, grads, jnp.float32(4.0))
    assert not sums["finite"]
    assert not sums["spike"]
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))


def test_an_update_that_overflows_changes_no_bit_and_counts_as_a_bad_step():
    step, state = program(POISONABLE, Poisoned)
    # A relative position that no row reaches: huge, so that the root mean square of its table,
    # which scales the update, overflows and no gradient does.
    params = jax.tree.map(jnp.copy, state.params)
    bias = params["blocks"]["dense_layer"]["attention"]["bias"]
    bias["table"] = bias["table"].at[..., -1].set(1e30)
    before = state._replace(params=params)
    after, sums = step(before, padded_batch())
    assert np.isfinite(sums["grad_norm"])
    assert not bool(sums["finite"])
    assert (int(after.step), int(after.bad_steps), int(after.bad_steps_total)) == (1, 1, 1)
    assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))


@pytest.mark.slow
def test_the_program_of_a_step_does_not_grow_with_depth():
    def size(num_layers):
        model = MODEL.model_copy(update={"num_layers": num_layers})
        decoder = Decoder(model, POISONABLE.moe, remat="full")
        step = jax.jit(make_train_step(decoder, POISONABLE, num_sources=3))
        state = abstract_state(decoder, POISONABLE.optimizer)
        return len(step.lower(state, padded_batch()).as_text().splitlines())

    assert size(UNROLLED_LAYERS + 2) == size(16)


def test_drawn_second_choices_depend_on_seed_and_step_alone():
    step, state = program(POISONABLE, Poisoned)
    batch = padded_batch()
    once, again = (step(state, batch)[1]["routing"]["served_3"] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    later = step(state._replace(step=jnp.int32(1)), batch)[1]["routing"]["served_3"]
    assert np.any(np.asarray(later) != np.asarray(once))


def test_held_out_loss_is_that_of_scoring_where_training_drops():
    asked = recipe(capacity_factor=0.5)
    decoder = Decoder(MODEL, asked.moe)
    params, batch = first_state(asked.optimizer).params, padded_batch()

    def loss(dispatch):
        x_BSM, stats = decoder.hidden(params, batch["tokens"], batch["segments"], dispatch=dispatch)
        nats_BS, _ = decoder.losses(params, x_BSM, batch["targets"])
        return jnp.sum(jnp.where(batch["segments"] != 0, nats_BS, 0.0)), stats["dropped_frac"]

    sums = jax.jit(make_heldout_step(decoder, asked, num_sources=3))(params, batch)
    scored, trained = jax.jit(lambda: (loss("dropless"), loss(None)))()
    assert trained[1][0] > 0.05
    assert abs(trained[0] - scored[0]) > 1e-3 * scored[0]
    np.testing.assert_allclose(sums["loss_nats"], scored[0], rtol=1e-5)


def test_steps_on_one_batch_lower_its_loss():
    asked = recipe(1, dispatch="dropless", balance_coef=1.0)
    step, state = program(asked)
    losses = []
    for _ in range(8):
        state, sums = step(state, padded_batch())
        losses.append(float(sums["loss"]))
    assert losses[-1] < losses[0]
    assert sorted(losses, reverse=True)[:4] == losses[:4]
