"""Relative position bias of attention logits: T5 buckets, one-directional, one table per layer.

Buckets are decided in integers, never in the activation dtype: in bfloat16 the boundaries move.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import normal

from glamcli.config.sharding import ATTENTION
from glamcli.model.params import param


@lru_cache
def bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance up to the first one of the last bucket (T5, section 2.1).

    The first half of the buckets holds one distance each, the others grow by a constant factor
    up to `max_distance`. With 32 and 128 they start at 16, 19, 21, 24, 27, ... 99, 113.
    """
    exact = num_buckets // 2
    num_wide = num_buckets - exact
    starts = list(range(exact)) or [0]
    distance = exact
    for wide in range(num_wide if exact else 0):
        # Smallest d with log(d / exact) / log(max_distance / exact) * num_wide >= wide, in
        # integers: d^num_wide * exact^wide >= max_distance^wide * exact^num_wide.
        while distance**num_wide * exact**wide < max_distance**wide * exact**num_wide:
            distance += 1
        starts.append(distance)
    distances = np.arange(starts[-1] + 1)
    return (np.searchsorted(np.array(starts), distances, side="right") - 1).astype(np.int32)


class RelativeBias(nnx.Module):
    """A learned float32 number per head and bucket of distance (query minus key position)."""

    def __init__(self, rngs: nnx.Rngs, num_heads: int, num_buckets: int, max_distance: int):
        init = normal((num_heads * num_buckets) ** -0.5)
        self.table = param(rngs, (num_heads, num_buckets), ATTENTION["attention.bias.table"], init)
        self.num_buckets = num_buckets
        self.max_distance = max_distance

    def __call__(self, num_queries: int, num_keys: int, start_B: Array) -> Array:
        """Bias [B, N, S, T] of queries at `start_B`, `start_B` + 1, ... over keys at 0, 1, ..."""
        buckets = bucket_table(self.num_buckets, self.max_distance)
        offset = _offset(num_queries, num_keys)
        distance_Bd = jnp.clip(start_B[:, None] - offset[None, :], 0, len(buckets) - 1)
        values_NBd = jnp.take(self.table[...], jnp.asarray(buckets)[distance_Bd], axis=1)
        return diagonals(jnp.swapaxes(values_NBd, 0, 1), num_queries, num_keys)

    def of(self, table_XNR: Array, num_queries: int, num_keys: int) -> Array:
        """That of these tables, queries starting at 0: [..., N, S, T] of [..., N, R].

        Depends on distances only, so S + T - 1 values are looked up and laid out along diagonals;
        the gradient is sums along diagonals, with no scatter over S x T.
        """
        buckets = bucket_table(self.num_buckets, self.max_distance)
        distance = np.clip(-_offset(num_queries, num_keys), 0, len(buckets) - 1)
        return diagonals(jnp.take(table_XNR, buckets[distance], axis=-1), num_queries, num_keys)

    @jax.named_scope("bias")
    def band(self, table_XNR: Array, block: int) -> Array:
        """That of these tables at `band_distances`, [X, N, 2 x block]."""
        from glamcli.model.kernels.bias_band import band_distances  # Pallas takes a while to import

        buckets = bucket_table(self.num_buckets, self.max_distance)
        distance = np.minimum(band_distances(block), len(buckets) - 1)
        return jnp.take(table_XNR, buckets[distance], axis=-1)


def _offset(num_queries: int, num_keys: int) -> np.ndarray:
    """Key minus query index, from the corner of the last query to that of the last key."""
    return np.arange(1 - num_queries, num_keys, dtype=np.int32)


def diagonals(values: Array, num_queries: int, num_keys: int) -> Array:
    """The matrices [..., S, T] whose entry (s, t) is value (S - 1) - s + t of S + T - 1."""
    *rest, length = values.shape
    # Rows one longer than they are read shift each row by one entry against the one above.
    padded = jnp.pad(values, [(0, 0)] * len(rest) + [(0, 1)])
    rows = jnp.broadcast_to(padded[..., None, :], (*rest, num_queries, length + 1))
    flat = rows.reshape(*rest, num_queries * (length + 1))[..., : num_queries * length]
    return flat.reshape(*rest, num_queries, length)[..., num_queries - 1 :]
