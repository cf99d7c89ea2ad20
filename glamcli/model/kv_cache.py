"""The key/value cache of incremental decoding: plain dicts, rows of different lengths.

`layers` holds keys and values [L, B, T, N, D] per layer of a block, stacked over blocks, or is a
list of blocks, each with its own [B, T, N, D], where the decoder's blocks are apart;
`segments` [B, T] is the segment at each position (0: empty); `length` [B] is the position where a
row continues. Rows start at different lengths after a prompt padded on either side: padding in
front takes up positions that no query attends to, padding behind is overwritten by what comes next.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Cache = dict[str, Any]


class Past(NamedTuple):
    """What new tokens attend to, in one block or layer: its cached keys and values, the segments of
    all positions, which have the new tokens already, and where each row's new tokens start."""

    cached: dict[str, Any]
    segments_BT: Array
    start_B: Array


def select_rows(cache: Cache, rows_B: Array) -> Cache:
    """The cache of these rows, in this order; beam search keeps its best continuations so."""
    return {
        "layers": jax.tree.map(lambda x: jnp.take(x, rows_B, axis=-4), cache["layers"]),
        "segments": jnp.take(cache["segments"], rows_B, axis=0),
        "length": jnp.take(cache["length"], rows_B, axis=0),
    }


def extended(cache: Cache, num: int) -> Cache:
    """The cache with `num` more positions per row, all empty."""

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, num if dim == axis % x.ndim else 0) for dim in range(x.ndim)])

    return {
        "layers": jax.tree.map(lambda x: longer(x, -3), cache["layers"]),
        "segments": longer(cache["segments"], 1),
        "length": cache["length"],
    }


def insert(cache_BT: Array, new_BS: Array, start_B: Array) -> Array:
    """The cache [B, T, ...] with new entries [B, S, ...] from `start_B` on; those past its end are
    left out."""
    row_B1 = jnp.arange(cache_BT.shape[0], dtype=jnp.int32)[:, None]
    return cache_BT.at[row_B1, positions(start_B, new_BS.shape[1])].set(new_BS, mode="drop")


def positions(start_B: Array, num: int) -> Array:
    """The cache positions [B, S] of `num` new tokens per row."""
    return start_B[:, None] + jnp.arange(num, dtype=jnp.int32)[None, :]


def used_positions(segments_BS: Array) -> Array:
    """How many positions each row [B] uses of these: up to its last real token."""
    index_S = jnp.arange(1, segments_BS.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(segments_BS != 0, index_S[None, :], 0), axis=1)
