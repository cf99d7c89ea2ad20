"""Spikes stand out from the steps before them; noise, falls, other weights and NaN do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config.guard import Guard
from glamcli.config.load import load_recipe
from glamcli.config.schema import Optimizer
from glamcli.train.guard import RECENT, WINDOW, explosion, judge, new_window
from unit.train.test_step import (
    DECODER,
    assert_same_bits,
    first_state,
    padded_batch,
    program,
    recipe,
)

RECIPE = load_recipe("test-tiny", []).recipe
NOISE = np.random.default_rng(0).normal(size=(3, 2000))


@functools.cache
def judging(restarts=(), guard=RECIPE.guard):
    settings = RECIPE.model_copy(update={"guard": guard})
    return jax.jit(functools.partial(judge, settings, restarts))


def spikes(losses, grad_norms=None, update_norms=None, rates=None, **options):
    """The numbers of the steps that are spikes; their updates are not applied."""
    window, found = new_window(), []
    ones = np.ones_like(losses)
    series = (losses, grad_norms, update_norms, rates)
    each = zip(*(ones if s is None else s for s in series), strict=True)
    for step, numbers in enumerate(each, 1):
        verdict = judging(**options)(window, jnp.int32(step), *map(jnp.float32, numbers))
        if verdict.is_spike:
            found.append(step)
        elif np.isfinite(numbers[0]):
            window = verdict.window
    return found


def falling(num_steps):
    return 3 + 4 * np.exp(-np.arange(num_steps) / 60) + 0.05 * NOISE[0, :num_steps]


def test_noise_and_a_falling_loss_are_no_spikes():
    norms = np.exp(0.3 * NOISE[1:, :600])
    assert spikes(falling(600), *norms) == []


@pytest.mark.parametrize("quantity", [0, 1, 2], ids=["loss", "gradient", "update"])
def test_a_jump_of_any_of_the_three_is_a_spike_and_the_next_step_is_none(quantity):
    series = np.stack([falling(300), *np.exp(0.1 * NOISE[1:, :300])])
    series[quantity, 250] *= 10
    assert spikes(*series) == [251]


def test_the_trend_of_a_steep_fall_hides_no_spike():
    losses = 3 + 6 * np.exp(-np.arange(100) / 40) + 0.05 * NOISE[0, :100]
    losses[60] += 1.5
    assert spikes(losses) == [61]


def test_every_step_of_a_higher_level_is_a_spike_so_that_the_run_ends():
    losses = falling(300)
    losses[200:] += 4
    assert spikes(losses)[:50] == list(range(201, 251))


def test_steps_that_are_not_finite_neither_count_nor_blind_the_window():
    losses = falling(300)
    losses[100:140] = np.nan
    losses[100:120] = np.inf
    losses[250] += 5
    assert [s for s in spikes(losses) if not 100 < s <= 140] == [251]


def test_the_rate_of_a_warm_up_explains_the_growth_of_updates():
    rates = np.minimum(1.0, np.arange(1, 301) / 200)
    assert spikes(falling(300), update_norms=rates, rates=rates) == []


def test_a_window_starts_anew_where_the_weights_of_the_mixture_change():
    losses = falling(300)
    losses[150:] += 3
    assert spikes(losses)[0] == 151
    assert spikes(losses, restarts=(150,)) == []
    losses[250] += 5
    assert spikes(losses, restarts=(20, 150)) == [251], "and finds spikes again"
    verdict = judging((150,))(new_window(), jnp.int32(151), *jnp.ones(4, jnp.float32))
    assert np.isnan(verdict.deviations).all()


def test_an_explosion_needs_no_window():
    limit = explosion(RECIPE)
    assert limit == pytest.approx(2 * np.log(512) + 10)
    assert spikes(np.array([6.7, limit + 0.1, limit - 0.1, 192_647.0])) == [2, 4]
    off = Guard(spike_deviations=None)
    assert spikes(np.array([6.7, 192_647.0, *falling(60), 30.0]), guard=off) == []


def filled(state):
    """The state after enough ordinary steps: loss 4, gradient and relative update of norm 1."""
    steps = np.arange(1, WINDOW + 1)
    window = np.stack([steps, np.full(WINDOW, 4.0), np.zeros(WINDOW), np.zeros(WINDOW)])
    assert WINDOW > RECENT
    return state._replace(step=jnp.int32(WINDOW), window=jnp.float32(window))


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(factored_min_dim=8),
        pytest.param(Optimizer(name="adamw", beta1=0.9), marks=pytest.mark.slow),
    ],
    ids=["adafactor", "adamw"],
)
def test_a_spike_changes_no_bit_but_the_counters_and_an_ordinary_step_moves_the_window(settings):
    asked = recipe(optimizer=settings)
    step, state = program(asked)
    probe, _ = step(state, padded_batch())
    before = filled(state)
    usual = np.array(probe.window[1:, -1])
    before = before._replace(window=before.window.at[1:].set(usual[:, None]))
    after, sums = step(before, padded_batch())
    assert not sums["spike"]
    np.testing.assert_allclose(sums["deviations"], 0.0, atol=0.05)
    want = [float(sums[name]) for name in ("grad_norm", "update_norm")]
    np.testing.assert_allclose(sums["typical"][1:], want, rtol=1e-4)
    np.testing.assert_array_equal(after.window[:, :-1], before.window[:, 1:])
    assert (int(after.window[0, -1]), int(after.bad_steps)) == (WINDOW + 1, 0)

    for row in (1, 2, 3):
        low = before._replace(window=before.window.at[row].add(-5.0))
        after, sums = step(low, padded_batch())
        assert sums["spike"]
        assert sums["finite"]
        assert [bool(d > 6) for d in sums["deviations"]] == [row == r for r in (1, 2, 3)]
        unchanged = (after.params, after.opt_state, after.window)
        assert_same_bits(unchanged, (low.params, low.opt_state, low.window))
        assert (int(after.step), int(after.bad_steps)) == (WINDOW + 1, 1)
        assert int(after.bad_steps_total) == 1


def test_the_norm_of_an_update_is_that_of_what_is_added_to_the_weights():
    asked = recipe(optimizer=Optimizer(factored_min_dim=8))
    step, state = program(asked)
    after, sums = step(state, padded_batch())
    added = jax.tree.map(lambda new, old: new - old, after.params, state.params)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(added)))
    assert float(sums["update_norm"]) == pytest.approx(norm, rel=1e-4)
    assert DECODER.axes.keys() == added.keys()
    assert first_state(asked.optimizer).window.shape == (4, WINDOW)
