"""What training carries from step to step: one pytree, and the sharding of every leaf.

Everything else is a pure function of `step`: the rows of a batch, the randomness of the routers,
the learning rate. The loop has one `State`; checkpoints save it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from glamcli.config.schema import Optimizer
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Tree
from glamcli.train.guard import new_window
from glamcli.train.optimizer import init_opt_state, optimizer_axes


class State(NamedTuple):
    """Weights, optimizer state and counters; int32 scalars count steps."""

    step: Array
    """batches consumed, skipped updates included: the next batch is batch `step` of the run."""
    params: Tree
    opt_state: Tree
    """`count` in it counts applied updates only: rates and decays do not move on a bad step."""
    bad_steps: Array
    """steps in a row, up to the last one, whose update was skipped."""
    bad_steps_total: Array
    window: Array
    """what the guard remembers of the last applied steps (`guard.py`), float32 [4, 128]."""


def init_state(decoder: Decoder, settings: Optimizer, seed: int, mesh: Mesh | None = None) -> State:
    """The state before the first step, which depends on the seed alone; on a mesh every device
    computes its own parts."""
    shardings = None if mesh is None else state_shardings(decoder, settings, mesh)
    return jax.jit(lambda: _new_state(decoder, settings, seed), out_shardings=shardings)()


def abstract_state(decoder: Decoder, settings: Optimizer, mesh: Mesh | None = None) -> State:
    """Shapes, dtypes and, on a mesh, shardings of a state, with nothing allocated."""
    state = jax.eval_shape(lambda: _new_state(decoder, settings, 0))
    if mesh is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(decoder, settings, mesh),
    )


def state_axes(decoder: Decoder, settings: Optimizer) -> State:
    """Logical axis names of every leaf."""
    opt_state = optimizer_axes(settings, decoder.axes, decoder.shapes)
    return State._make([(), decoder.axes, opt_state, (), (), (None, None)])


def state_shardings(decoder: Decoder, settings: Optimizer, mesh: Mesh) -> State:
    """The sharding of every leaf on `mesh`."""
    parts = state_axes(decoder, settings)
    return State._make(decoder.layout.shardings(mesh, part) for part in parts)


def _new_state(decoder: Decoder, settings: Optimizer, seed: int) -> State:
    params = decoder.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    opt_state = init_opt_state(settings, decoder.axes, params)
    return State(zero, params, opt_state, zero, zero, new_window())
