"""Random initial values: threefry written out, so that programs that draw compile quickly.

XLA takes up to half a second of CPU to compile each array that `jax.random` draws, which for a
model is longer than everything else before the first step. The same generator (Salmon et al. 2011)
with its rounds unrolled compiles in a third of that (docs/decisions/0004). Like `jax.random`,
values are a function of key and index alone: the layout over devices does not change them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key: Array, shape: tuple[int, ...]) -> Array:
    """32 random bits per element; those of `jax.random.bits` up to two dimensions.

    The counter's low word runs over the last two dimensions, its high word over the others, so
    that both fit 32 bits for the largest expert weights.
    """
    low, high = _count(shape, len(shape) - 2, len(shape)), _count(shape, 0, len(shape) - 2)
    first, second = jax.random.key_data(key)
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = high + schedule[0], low + schedule[1]
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


def uniform(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Float32 values in [low, high), by the mantissa bits of numbers in [1, 2)."""
    one_to_two = (bits(key, shape) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - 1.0
    return jnp.maximum(unit * (np.float32(high) - np.float32(low)) + low, low)


def normal(key: Array, shape: tuple[int, ...], std: float) -> Array:
    """Float32 Gaussian values of mean zero, by inversion."""
    above_minus_one = float(np.nextafter(np.float32(-1.0), np.float32(0.0)))
    return std * math.sqrt(2) * jax.lax.erf_inv(uniform(key, shape, above_minus_one, 1.0))


def _count(shape: tuple[int, ...], start: int, stop: int) -> Array:
    """Row-major index over dimensions start..stop, mod 2^32, the same along all others."""
    total, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(max(start, 0), stop)):
        total = total + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
        stride *= shape[dim]
    return total
