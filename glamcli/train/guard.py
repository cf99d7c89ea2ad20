"""What happens when a gradient or an update is not finite: nothing, and it is counted.

A finite gradient gives such an update when the optimizer's own arithmetic overflows. The reference
code zeroes a bad gradient but lets the optimizer's averages decay; here weights and optimizer
state keep every bit (GLaM section 5 skips the update; see also paxml).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.errors import TrainError
from glamcli.train.state import State


def advance(state: State, finite: Array, params: Any, opt_state: Any) -> State:
    """The next state: the new weights and optimizer state if `finite`, else the old ones.

    `step` moves on either way, so that a bad batch is left behind and not met again.

    Note: a choice per element, not a branch. It fuses with the addition of the update, so a
    good step pays nothing (measured), and it is the same program on every device.
    """
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    bad = jnp.logical_not(finite).astype(jnp.int32)
    return State(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        bad_steps=(state.bad_steps + 1) * bad,
        bad_steps_total=state.bad_steps_total + bad,
    )


def check_bad_steps(
    bad_steps: int, limit: int, step: int, last_good: Callable[[], int | None]
) -> None:
    """Gives up after `limit` bad steps in a row, the last of them ending at `step`.

    Raises:
        TrainError: naming the checkpoint to go back to.
    """
    if bad_steps < limit:
        return
    newest = last_good()
    steps = "step" if bad_steps == 1 else "steps"
    raise TrainError(
        f"updates not finite at step {step} for {bad_steps} {steps} in a row",
        hint="there is no checkpoint to go back to"
        if newest is None
        else f"last good checkpoint: step {newest}",
    )
