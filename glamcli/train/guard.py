"""Whether the numbers of a step are in keeping with those of the steps before it.

Decided on the devices, inside the step, from a window that is part of the training state: so the
decision costs no wait, is the same in every process, and a resumed run makes the same ones.

Three numbers are looked at: the loss, and the logarithms of the norms of gradient and update, the
latter per unit of the learning rate. A step is a spike when one of them is more than
`guard.spike_deviations` above the median of the last applied steps. One deviation comes from the
differences of successive steps, which a loss that is still falling hardly widens. Only applied
steps count, so a spike never hides the next one, and nothing that is not finite gets in. The
window starts anew where the mixture's weights change.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.config.schema import Recipe

WINDOW = 128
"""applied steps that one deviation is estimated from, at most."""
RECENT = 32
"""applied steps that the median is taken over; with fewer only the absolute limit holds."""
FLOORS = (0.05, 0.35, 0.35)
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
    meaningless while there are too few steps."""
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


@jax.named_scope("guard")
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
    steps, before = window[0], window[1:]
    is_known = steps > begins.astype(jnp.float32)
    count = jnp.sum(is_known, dtype=jnp.float32)
    ranked = jnp.sort(before[:, -RECENT:], axis=1)
    medians = (ranked[:, RECENT // 2 - 1] + ranked[:, RECENT // 2]) / 2
    changes = jnp.where(is_known[:-1], jnp.diff(before, axis=1), 0.0)
    # The difference of two independent numbers has twice their variance.
    variance = jnp.sum(jnp.square(changes), axis=1) / jnp.maximum(count - 1, 1) / 2
    deviations = (values - medians) / jnp.maximum(jnp.sqrt(variance), jnp.float32(FLOORS))
    deviations = jnp.where(count >= RECENT, deviations, jnp.nan)

    if (limit := recipe.guard.spike_deviations) is None:
        is_spike = jnp.bool_(False)
    else:
        is_spike = jnp.any(deviations > limit) | (loss > explosion(recipe))
    norms = jnp.exp(medians[1:]) * jnp.stack([jnp.float32(1.0), rate])
    typical = jnp.concatenate([medians[:1], norms])
    newest = jnp.concatenate([step.astype(jnp.float32)[None], values])
    return Verdict(
        is_spike, deviations, typical, jnp.concatenate([window[:, 1:], newest[:, None]], axis=1)
    )
