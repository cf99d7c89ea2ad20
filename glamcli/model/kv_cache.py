"""The key/value cache of incremental decoding: plain dicts, rows of different lengths.

`layers` holds keys and values [P, B, C, N, D] per layer of a block, stacked over blocks, or is a
list of blocks, each with its own [B, C, N, D], where the decoder's blocks are apart;
`segments` [B, C] says what a place holds (0: nothing); `length` [B] is where a row goes on. Rows
start at different lengths after a prompt padded on either side: padding in front takes up places
that nobody attends to, padding behind is overwritten by what comes next.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Cache = dict[str, Any]


def select_rows(cache: Cache, rows_B: Array) -> Cache:
    """The cache of these rows, in this order; beam search keeps its best continuations so."""
    return {
        "layers": jax.tree.map(lambda x: jnp.take(x, rows_B, axis=-4), cache["layers"]),
        "segments": jnp.take(cache["segments"], rows_B, axis=0),
        "length": jnp.take(cache["length"], rows_B, axis=0),
    }


def extended(cache: Cache, num: int) -> Cache:
    """The cache with so many more places per row, all empty."""

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, num if dim == axis % x.ndim else 0) for dim in range(x.ndim)])

    return {
        "layers": jax.tree.map(lambda x: longer(x, -3), cache["layers"]),
        "segments": longer(cache["segments"], 1),
        "length": cache["length"],
    }


def write(cache_BC: Array, new_BT: Array, start_B: Array) -> Array:
    """The cache with new entries from `start_B` on; places past its end are not written.

    Shapes: [B, C, ...] and [B, T, ...].
    """
    row_B1 = jnp.arange(cache_BC.shape[0], dtype=jnp.int32)[:, None]
    return cache_BC.at[row_B1, places(start_B, new_BT.shape[1])].set(new_BT, mode="drop")


def places(start_B: Array, num: int) -> Array:
    """The places [B, T] that new tokens take."""
    return start_B[:, None] + jnp.arange(num, dtype=jnp.int32)[None, :]


def advance(segments_BT: Array) -> Array:
    """How far each row [B] moves on: to behind its last real token."""
    index_T = jnp.arange(1, segments_BT.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(segments_BT != 0, index_T[None, :], 0), axis=1)
