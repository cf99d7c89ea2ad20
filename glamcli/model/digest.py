"""A digest of parameters that does not depend on how they are laid out over devices.

Every element is hashed together with its position, and the hashes are added modulo 2^32: sums of
whole numbers come out the same in any order, so one device and a thousand agree to the last bit.
Two such sums per array find accidents (a flipped bit, another step, swapped experts); they do
not protect against tampering.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def digest(params: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and content sums of all arrays of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    sums = jax.device_get(_content([leaf for _, leaf in leaves]))
    described = [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape), [int(s) for s in pair]]
        for (path, leaf), pair in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _sums(x: Array) -> tuple[Array, Array]:
    """Two sums over all elements, each of a different hash of (position, bits)."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # axis by axis, so that no number of elements overflows
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = _mixed(position + along + jnp.uint32(0x9E3779B1))
    first = _mixed(bits ^ position)
    second = _mixed(bits + _mixed(position ^ jnp.uint32(0x5BD1E995)))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


_content = jax.jit(lambda leaves: [_sums(leaf) for leaf in leaves])


def _mixed(h: Array) -> Array:
    """Every bit of the result depends on every bit of `h` (the finalizer of MurmurHash3)."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))
