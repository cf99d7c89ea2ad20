"""What differs between two saved steps, of one run or of two: settings, software, data, arrays.

Arrays are read one pair at a time, so the memory that this takes is that of the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.progress import Progress
from glamcli.step_folders import describing, step_meta
from glamcli.stored_arrays import read_array
from glamcli.train import identity

# Of the description itself, besides the identity of the run.
OWN_FACTS = ("step", "format", "good", "skipped_batches", "recipe_hash")


@dataclass(frozen=True)
class ArrayDifference:
    """How an array of the second step differs from that of the first."""

    name: str
    shape: list[int]
    num_different: int
    """elements with other values; NaNs are equal to each other."""
    max_abs: float
    """largest absolute difference; NaN where an element of one of them is not finite."""
    relative: float
    """norm of the difference over the norm of the first."""


@dataclass(frozen=True)
class StepDiff:
    """What differs between two steps."""

    facts: dict[str, list[tuple[str, Any, Any]]]
    """by part of the descriptions: key and both values, None where absent."""
    num_equal: int
    arrays: list[ArrayDifference]
    """the arrays of one shape that differ, most (relatively) first."""
    others: list[tuple[str, Any, Any]]
    """arrays of another dtype or shape, or in one step only: name and each [dtype, shape]."""


def diff_steps(first: Path, second: Path, progress: Progress) -> StepDiff:
    """Compares two step folders.

    Raises: CheckpointError when one of them cannot be read.
    """
    metas = step_meta(first), step_meta(second)
    for folder, meta in zip((first, second), metas, strict=True):
        with describing(folder):  # before the two are compared: it names the folder
            identity.compared(meta, meta)
    own = [{key: meta.get(key) for key in OWN_FACTS} for meta in metas]
    facts = {"step": [(k, own[0][k], own[1][k]) for k in OWN_FACTS if own[0][k] != own[1][k]]}
    facts |= identity.compared(*metas)
    trees = [meta["tree"] for meta in metas]
    others, shared = [], []
    for name in sorted({*trees[0], *trees[1]}):
        entries = trees[0].get(name), trees[1].get(name)
        if entries[0] == entries[1]:
            shared.append(name)
        else:
            others.append((name, *entries))
    arrays, num_equal = [], 0
    with progress.phase("comparing", total=len(shared), unit="arrays") as bar:
        for name in shared:
            if _known_equal(metas, name):
                difference = None
            else:
                pair = read_array(first, name), read_array(second, name)
                difference = _difference(name, *pair)
            if difference is None:
                num_equal += 1
            else:
                arrays.append(difference)
            bar.advance()
    arrays.sort(key=lambda each: (each.relative == each.relative, -each.relative, each.name))
    return StepDiff(facts, num_equal, arrays, others)


def _known_equal(metas: tuple[Mapping[str, Any], ...], name: str) -> bool:
    """Whether both steps have the same digest of this array, which then need not be read."""
    digests = [meta.get("digests", {}).get(name) for meta in metas]
    return digests[0] is not None and digests[0] == digests[1]


def _difference(name: str, first: Array, second: Array) -> ArrayDifference | None:
    num_different, max_abs, norm, norm_of_first = jax.device_get(_numbers(first, second))
    if not (count := int(np.sum(num_different, dtype=np.int64))):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = float(norm / norm_of_first)
    return ArrayDifference(name, list(first.shape), count, float(max_abs), relative)


@jax.jit
def _numbers(first: Array, second: Array) -> tuple[Array, Array, Array, Array]:
    """Unequal elements (by all but the last axis: there may be more than an int32 counts), the
    largest difference, norms of the difference and of the first."""
    first, second = jnp.atleast_1d(first), jnp.atleast_1d(second)
    unequal = (first != second) & ~((first != first) & (second != second))
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    change = jnp.where(unequal, jnp.abs(a - b), 0.0)
    norms = [jnp.sqrt(jnp.sum(jnp.square(x))) for x in (change, a)]
    num_different = jnp.sum(unequal, axis=-1, dtype=jnp.int32)
    return num_different, jnp.max(change, initial=0.0), norms[0], norms[1]
