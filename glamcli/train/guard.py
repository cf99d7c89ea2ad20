"""Whether the numbers of a step are in keeping with those of the steps before it.

Decided on the devices, inside the step, from a window that is part of the training state: so the
decision costs no wait, is the same in every process, and a resumed run makes the same ones.

Three numbers are looked at: the loss, and the logarithms of the norms of gradient and update, the
latter per unit of the learning rate. A step is a spike when one of them is more than
`guard.spike_deviations` above the median of the window, counted in the root mean square of the
window's own deviations upwards: a fall is no spike, and a loss that is still falling has a wide
window. The window holds applied steps only, so a spike never hides the next one, and nothing that
is not finite gets in. It starts anew where the mixture's weights change.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.config.schema import Recipe

WINDOW = 128
MIN_STEPS = 32
"""with fewer steps in the window only the absolute limit of the loss holds."""
FLOORS = (0.05, 0.2, 0.2)
"""the least that counts as one deviation, of the loss in nats and of the two logarithms: steps that
happen to be very much alike must not make a spike of any other."""


class Verdict(NamedTuple):
    """What the window says of a step."""

    is_spike: Array
    deviations: Array
    """how far loss, gradient norm and update norm are above their medians, float32 [3]; NaN while
    there are too few steps."""
    typical: Array
    """the medians of loss, gradient norm and update norm at the step's learning rate, float32 [3];
    0 while there are no steps."""
    window: Array
    """the next window if the step is applied."""


def new_window() -> Array:
    """The window before the first step, float32 [4, steps]: the number of a step, 0 for none, its
    loss, and the logarithms of its norms."""
    return jnp.zeros((1 + len(FLOORS), WINDOW), jnp.float32)


def explosion(recipe: Recipe) -> float:
    """A loss above this, in nats, is a spike without any steps to compare it with: guessing blindly
    costs ln V, and initial weights or noise cost a little more."""
    return 2 * math.log(recipe.model.vocab_size) + 10


def judge(
    recipe: Recipe,
    restarts: tuple[int, ...],
    window: Array,
    step: Array,
    loss: Array,
    grad_norm: Array,
    update_norm: Array,
    rate: Array,
) -> Verdict:
    """Compares step number `step` (from 1) with the window before it.

    `restarts` are the numbers of steps after which the window starts anew.
    """
    smallest = jnp.float32(np.finfo(np.float32).tiny)
    norms = jnp.stack([grad_norm, update_norm / rate])
    values = jnp.concatenate([loss[None], jnp.log(jnp.maximum(norms, smallest))])

    begins = jnp.int32(0)
    for restart in restarts:
        begins = jnp.where(step > restart, jnp.int32(restart), begins)
    steps, before = window[:1], window[1:]
    is_known = steps > begins.astype(jnp.float32)
    count = jnp.sum(is_known, dtype=jnp.int32)
    ranked = jnp.sort(jnp.where(is_known, before, jnp.inf), axis=1)
    middle = jnp.take(ranked, jnp.maximum(count - 1, 0) // 2, axis=1)
    medians = jnp.where(count > 0, middle, jnp.float32(0.0))
    above = jnp.where(is_known, jnp.maximum(before - medians[:, None], 0.0), 0.0)
    half = jnp.maximum(count, 1).astype(jnp.float32) / 2
    spread = jnp.sqrt(jnp.sum(jnp.square(above), axis=1) / half)
    deviations = (values - medians) / jnp.maximum(spread, jnp.float32(FLOORS))
    deviations = jnp.where(count >= MIN_STEPS, deviations, jnp.nan)

    if (limit := recipe.guard.spike_deviations) is None:
        is_spike = jnp.bool_(False)
    else:
        is_spike = jnp.any(deviations > limit) | (loss > explosion(recipe))
    typical = jnp.where(count > 0, jnp.exp(medians) * jnp.stack([1.0, 1.0, rate]), 0.0)
    typical = typical.at[0].set(medians[0])
    newest = jnp.concatenate([step.astype(jnp.float32)[None], values])
    return Verdict(
        is_spike, deviations, typical, jnp.concatenate([window[:, 1:], newest[:, None]], axis=1)
    )
