"""Rows moved by index between tokens and the experts' queue, with their gradients.

Two tables describe every such move: `choice_Q`, the choice (token x K + k) in each row of the
queue, F x K when it is empty; and `row_FK`, the row of each choice, Q when it is not moved. Each is
the other's inverse, so both directions, and the gradients of both, are reads by index: no scattered
additions. Called by `dispatch.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def invert(row_FK: Array, num_rows: int) -> Array:
    """choice_Q of `row_FK` for a queue of so many rows."""
    choices = jnp.arange(row_FK.size, dtype=jnp.int32)
    empty_Q = jnp.full(num_rows, row_FK.size, jnp.int32)
    return empty_Q.at[row_FK.reshape(-1)].set(choices, mode="drop")


@jax.custom_vjp
def collect(x_FM: Array, choice_Q: Array, row_FK: Array) -> Array:
    """The token of each row of the queue, [Q, M]; zeros in empty ones."""
    return _rows(x_FM, choice_Q // row_FK.shape[1])


def _collect_backward(row_FK: Array, dx_QM: Array):
    dx_KFM = (_rows(dx_QM, row_F).astype(jnp.float32) for row_F in row_FK.T)
    return functools.reduce(jnp.add, dx_KFM).astype(dx_QM.dtype), None, None


collect.defvjp(lambda *args: (collect(*args), args[-1]), _collect_backward)


@jax.custom_vjp
def combine(out_QM: Array, weight_FK: Array, choice_Q: Array, row_FK: Array) -> Array:
    """Each token's weighted sum over the rows of its choices, [F, M], summed in float32."""
    y_KFM = (
        _rows(out_QM, row_F).astype(jnp.float32) * weight_F[:, None]
        for row_F, weight_F in zip(row_FK.T, weight_FK.T, strict=True)
    )
    return functools.reduce(jnp.add, y_KFM).astype(out_QM.dtype)


def _combine_backward(saved: tuple[Array, Array, Array, Array], dy_FM: Array):
    out_QM, weight_FK, choice_Q, row_FK = saved
    weight_Q = jnp.take(weight_FK.reshape(-1), choice_Q, mode="fill", fill_value=0)
    dy_QM = _rows(dy_FM, choice_Q // row_FK.shape[1]).astype(jnp.float32)
    dout_QM = (dy_QM * weight_Q[:, None]).astype(out_QM.dtype)
    dweight_KF = [
        jnp.sum(_rows(out_QM, row_F).astype(jnp.float32) * dy_FM.astype(jnp.float32), axis=1)
        for row_F in row_FK.T
    ]
    return dout_QM, jnp.stack(dweight_KF, axis=1), None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


def _rows(x_FM: Array, index_Q: Array) -> Array:
    """Rows by index; zeros for an index past the end."""
    return jnp.take(x_FM, index_Q, axis=0, mode="fill", fill_value=0)
