"""Laws of the learning rate and of the second-moment decay."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glamcli.config.schema import Optimizer
from glamcli.train.optimizer import learning_rate, second_moment_decay

PAPER = Optimizer()
steps = st.integers(1, 2_000_000)


@pytest.mark.parametrize(
    ("step", "rate"), [(1, 0.01), (10_000, 0.01), (40_000, 0.005), (600_000, 0.001291)]
)
def test_the_papers_rates(step, rate):
    assert float(learning_rate(PAPER, step)) == pytest.approx(
        rate, rel=1e-6 if rate != 0.001291 else 1e-4
    )


@pytest.mark.parametrize(
    ("step", "decay"),
    [(1, 0.0), (10, 0.84151), (100, 0.97488), (1000, 0.996019), (10_000, 0.999369)],
)
def test_the_papers_second_moment_decay(step, decay):
    assert float(second_moment_decay(PAPER, jnp.int32(step))) == pytest.approx(decay, abs=5e-6)


@settings(deadline=None, max_examples=60)
@given(steps, steps)
def test_the_rate_never_rises_without_warmup(a, b):
    early, late = sorted((a, b))
    assert float(learning_rate(PAPER, late)) <= float(learning_rate(PAPER, early))


@settings(deadline=None, max_examples=60)
@given(steps, st.integers(1, 100_000))
def test_after_the_hold_four_times_the_steps_halve_the_rate(step, hold):
    law = Optimizer(hold_steps=hold)
    step = max(step, hold)
    four = float(learning_rate(law, 4 * step))
    assert four == pytest.approx(float(learning_rate(law, step)) / 2, rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_warmup_rises_linearly_to_the_unwarmed_rate(warmup, step):
    plain = float(learning_rate(PAPER, step))
    warm = float(learning_rate(Optimizer(warmup_steps=warmup), step))
    assert warm == pytest.approx(plain * min(1.0, step / warmup), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(steps)
def test_the_decay_is_a_share_that_grows(step):
    now, later = (float(second_moment_decay(PAPER, jnp.int32(s))) for s in (step, step + 1))
    assert 0.0 <= now <= later < 1.0
