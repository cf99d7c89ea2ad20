"""The relative position bias inside the Pallas kernels of attention: three matrices from one row.

In blocks of b queries and b keys only the matrices on the diagonal and those before them differ:
in all others every distance is in the last bucket. One row of 2b numbers per head holds them all
(`band_distances`), and its gradient is sums along diagonals.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from glamcli.model.kernels.attention import MASKED


def band_distances(block: int) -> np.ndarray:
    """The distance that each of the 2 x `block` numbers of a head's row stands for.

    Number u is for a key u - block after the query; rows wrap around, so that from block + 1 on
    it is for keys 2 x block before that.
    """
    u = np.arange(2 * block, dtype=np.int32)
    return np.where(u <= block, block - u, 3 * block - u)


def matrix_of(i: Array, j: Array) -> Array:
    """Which matrix holds for queries of block i and keys of block j: 2 on the diagonal, 1 just
    before it, 0 elsewhere."""
    return jnp.maximum(j - i + 2, 0)


def lay_out(band_ref: Any, bias: Any) -> None:
    """The three matrices of biases of every head, later keys masked."""
    heads, _, b, _ = bias.shape
    for head in range(heads):
        row_1w = band_ref[head]
        both_bw = _shifted(jnp.broadcast_to(row_1w, (b, 2 * b)), back=False)
        query, key = _positions(b)
        both_bw = jnp.where(key - b > query, MASKED, both_bw)
        bias[head, 0] = jnp.broadcast_to(row_1w[:, 2 * b - 1 :], (b, b))
        bias[head, 1] = both_bw[:, :b]
        bias[head, 2] = both_bw[:, b:]


def sum_diagonals(d_bias: Any, d_band_ref: Any) -> None:
    """The gradient of every head's row: sums along diagonals."""
    heads, _, b, _ = d_bias.shape
    for head in range(heads):
        both_bw = jnp.concatenate([d_bias[head, 1], d_bias[head, 2]], axis=1)
        near_1w = jnp.sum(_shifted(both_bw, back=True), axis=0, keepdims=True)
        far_11 = jnp.sum(jnp.sum(d_bias[head, 0], axis=0, keepdims=True), axis=1, keepdims=True)
        _, u = _positions(b)
        d_band_ref[head] = near_1w + jnp.where(u[:1] == 2 * b - 1, far_11, 0.0)


def _shifted(x_bw: Array, *, back: bool) -> Array:
    """Row s moved around by s to the right, or back: one rotation per bit of s, since TPU v4 has no
    rotation by another distance in each row."""
    b, width = x_bw.shape
    row, _ = _positions(b)
    for bit in range(int(math.log2(b))):
        distance = 2**bit
        moved = pltpu.roll(x_bw, width - distance if back else distance, 1)
        x_bw = jnp.where((row & distance) != 0, moved, x_bw)
    return x_bw


def _positions(b: int) -> tuple[Array, Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (b, 2 * b), dim) for dim in (0, 1))
    return row, column
