"""Bytes on one device by what they are for, and how each kind of array is laid out.

Sizes of weights, optimizer state and batch follow from shapes and the sharding table; what the
compiler reserves for everything else is known once a program is compiled.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

from glamcli.config.schema import Model, Moe, Optimizer, Recipe
from glamcli.config.sharding import ACTIVATIONS
from glamcli.config.sizes import capacity
from glamcli.data.rows import TOKEN_FIELDS
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout
from glamcli.train.state import abstract_state, state_axes

INT32 = 4


@dataclass(frozen=True)
class ArrayLayout:
    """One array and how it is laid out."""

    name: str
    shape: tuple[int, ...]
    split: tuple[tuple[str, ...], ...]
    """mesh axes with more than one device, by dimension."""
    bytes: int
    """on one device."""


@dataclass(frozen=True)
class StateBytes:
    """The arguments of a step, in bytes on one device, by their shapes."""

    weights: int
    optimizer: int
    batch: int
    arrays: tuple[ArrayLayout, ...]

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.batch


def state_bytes(recipe: Recipe, mesh_shape: Mapping[str, int]) -> StateBytes:
    """Sizes of weights, optimizer state and batch on a mesh of this shape. Allocates nothing."""
    layout = Layout.of(recipe.mesh)
    settings = (recipe.model, recipe.moe, recipe.optimizer)
    state, axes = _abstract(*settings)  # pyright: ignore[reportArgumentType]
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    dims = jax.tree.leaves(axes.params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    weights = tuple(
        _laid_out(
            jax.tree_util.keystr(path, simple=True, separator="."),
            leaf.shape,
            map(layout.split, names),
            leaf.dtype.itemsize,
            mesh_shape,
        )
        for (path, leaf), names in zip(leaves, dims, strict=True)
    )
    optimizer = layout.bytes_per_device(mesh_shape, state.opt_state, axes.opt_state)
    rows = -(-recipe.batch.rows // layout.parts("batch", mesh_shape))
    batch = rows * (len(TOKEN_FIELDS) * recipe.batch.row_tokens + 1) * INT32
    return StateBytes(sum(array.bytes for array in weights), optimizer, batch, weights)


@lru_cache(maxsize=16)
def _abstract(model: Model, moe: Moe | None, optimizer: Optimizer) -> tuple[Any, Any]:
    """Shapes and logical axes of a state; the same for every mesh."""
    decoder = Decoder(model, moe)
    return abstract_state(decoder, optimizer), state_axes(decoder, optimizer)


def _laid_out(
    name: str,
    shape: tuple[int, ...],
    axes: Iterable[tuple[str, ...]],
    itemsize: int,
    mesh_shape: Mapping[str, int],
) -> ArrayLayout:
    split = tuple(tuple(axis for axis in each if mesh_shape[axis] > 1) for each in axes)
    parts = [math.prod(mesh_shape[axis] for axis in each) for each in split]
    sizes = (-(-size // n) for size, n in zip(shape, parts, strict=True))
    return ArrayLayout(name, shape, split, math.prod(sizes) * itemsize)


def passing(recipe: Recipe, mesh_shape: Mapping[str, int]) -> tuple[ArrayLayout, ...]:
    """What passes between layers in one pass over a part of the batch: the residual stream and
    the slots that experts read. Whole shapes, bytes on one device."""
    layout, model, batch = Layout.of(recipe.mesh), recipe.model, recipe.batch
    rows = batch.rows // batch.accumulate // (recipe.pipeline.microbatches or 1)
    itemsize = 2 if model.activation_dtype == "bfloat16" else 4

    def laid_out(name: str, *shape: int) -> ArrayLayout:
        dims = zip(ACTIVATIONS[name], shape, strict=True)
        split = (layout.split_of(*dim, mesh_shape) for dim in dims)
        return _laid_out(name, shape, split, itemsize, mesh_shape)

    stream = laid_out("the residual stream", rows, batch.row_tokens, model.model_dim)
    if (moe := recipe.moe) is None:
        return (stream,)
    groups = rows * batch.row_tokens // moe.group_tokens
    slots = (moe.num_experts, groups, capacity(moe), model.model_dim)
    return stream, laid_out("tokens by expert", *slots)


def by_group(
    recipe: Recipe, state: StateBytes, mesh_shape: Mapping[str, int], temporaries: int
) -> dict[str, int]:
    """What state and temporaries take of one device, by group; adds up to both.

    Gradients are float32, one set as large as the weights (a second one while parts accumulate),
    and are taken out of the temporaries by arithmetic. Where that leaves less than one residual
    stream and its slots they stay one group (docs/decisions/0006).
    """
    gradients = (1 + (recipe.batch.accumulate > 1)) * state.weights
    rest = temporaries - gradients
    split = {"gradients": gradients, "activations and temporaries": rest}
    if rest < sum(array.bytes for array in passing(recipe, mesh_shape)):
        split = {"gradients and activations": temporaries}
    return {
        "weights": state.weights,
        "optimizer state": state.optimizer,
        **split,
        "batch": state.batch,
    }
