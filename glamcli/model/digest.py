"""Digests of arrays that do not depend on how they are laid out over devices.

Every element is hashed, multiplied by an odd key of its position, and the products are added modulo
2^32: sums of whole numbers come out the same in any order, so one device and a thousand agree to
the last bit. A flipped bit always changes such a sum, because a hash is a bijection and an odd
factor loses nothing; other accidents (another step, swapped experts, a block of zeros) escape the
two sums of an array with a chance of about 2^-64, or 2^-32 within one row of its last axis. They do
not protect against tampering.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from glamcli.named_leaves import described_leaves, named_leaves

LANES = 2
SMALL_BYTES = 1 << 18
"""Up to here an array is added up in this process: a program for its shape takes longer to compile
than the array to copy."""


def digest(params: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and content sums of all arrays of a tree."""
    named = named_leaves(jax.tree.map(jnp.asarray, params))
    content = {"tree": described_leaves(named), "digests": digests(named)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests(named: Mapping[str, Array]) -> dict[str, list[int]]:
    """The two sums of every array, in [0, 2^32). Of arrays that several processes hold parts of,
    all of them must call this alike."""
    large = {name for name, leaf in named.items() if not _is_small(leaf)}
    fetched = jax.device_get(
        {
            name: _sums(leaf, _keys(leaf.shape), leaf.sharding) if name in large else leaf
            for name, leaf in named.items()
        }
    )
    for name in named.keys() - large:
        part = np.atleast_1d(np.asarray(fetched[name]))
        bits = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)
        fetched[name] = _sums_of_part(bits, _keys(part.shape))
    return {name: [int(lane) for lane in fetched[name]] for name in named}


def _is_small(x: Array) -> bool:
    return x.nbytes <= SMALL_BYTES and (x.is_fully_addressable or x.is_fully_replicated)


@partial(jax.jit, static_argnums=2)
def _sums(x: Array, keys: list[Any], sharding: Sharding) -> list[Array]:
    """The sums on the devices. Each of a mesh adds up its own part, with the keys of that part."""
    bits = _bits(x)
    if not isinstance(sharding, NamedSharding):
        return _sums_of_part(bits, keys)
    split = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    over = [name for axes in split if axes for name in ([axes] if isinstance(axes, str) else axes)]
    return jax.shard_map(
        lambda part, keys: jax.lax.psum(_sums_of_part(part, keys), over),
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(*split), [PartitionSpec(None, axes) for axes in split]),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(bits, keys)


def content_sums(part: Array) -> Array:
    """The two sums of what one device holds of an array, uint32 [2], inside a program."""
    part = jnp.atleast_1d(part)
    return jnp.stack(_sums_of_part(_bits(part), _keys(part.shape)))


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)


def _sums_of_part(bits: Any, keys: list[Any]) -> list[Any]:
    """The sums of all elements times their keys, of uint32 arrays of numpy or jax. Both have the
    same keys along the last axis, so that the elements are read once."""
    *others, last = keys
    h = _mixed(bits) * last[0][(np.newaxis,) * (bits.ndim - 1)]
    for _ in range(3):
        # On CPUs XLA adds up one element at a time, but halves as vectors; and sums of sums in one
        # go, unless there is a barrier.
        if (size := h.shape[-1]) % 2 == 0:
            h = h[..., : size // 2] + h[..., size // 2 :]
    if isinstance(h, Array):
        h = jax.lax.optimization_barrier(h)
    rows = h.sum(axis=-1, dtype=np.uint32)
    return [_sum(rows, [key[lane] for key in others]) for lane in range(LANES)]


def _sum(h: Any, keys: list[Any]) -> Any:
    for key in reversed(keys):
        h = (h * key[(np.newaxis,) * (h.ndim - 1)]).sum(axis=-1, dtype=np.uint32)
    return h


@lru_cache(maxsize=256)
def _keys(shape: tuple[int, ...]) -> list[np.ndarray]:
    """For every axis odd uint32[LANES, size]: the factors of the positions along it."""
    starts = np.arange(1, 1 + LANES * len(shape), dtype=np.uint32) * np.uint32(0x9E3779B1)
    return [
        _mixed(_mixed(start + np.arange(size, dtype=np.uint32)) + start) | np.uint32(1)
        for start, size in zip(starts.reshape(len(shape), LANES, 1), shape, strict=True)
    ]


def _mixed(h: Any) -> Any:
    """Every bit of `h` changes many bits of the result, and no two `h` have the same."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
