"""Bytes on one device by what they are for, and how each kind of array is laid out.

Sizes of weights, optimizer state and batch follow from shapes and the sharding table; what the
compiler reserves for everything else is known once a program is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

from glamcli.config import sharding as arrays
from glamcli.config.schema import Model, Moe, Optimizer, Recipe
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
    weights = _layouts(layout, state.params, axes.params, mesh_shape)
    optimizer = layout.bytes_per_device(mesh_shape, state.opt_state, axes.opt_state)
    rows = -(-recipe.batch.rows // layout.parts("batch", mesh_shape))
    batch = rows * (len(TOKEN_FIELDS) * recipe.batch.row_tokens + 1) * INT32
    return StateBytes(sum(array.bytes for array in weights), optimizer, batch, weights)


@lru_cache(maxsize=16)
def _abstract(model: Model, moe: Moe | None, optimizer: Optimizer) -> tuple[Any, Any]:
    """Shapes and logical axes of a state; the same for every mesh."""
    decoder = Decoder(model, moe)
    return abstract_state(decoder, optimizer), state_axes(decoder, optimizer)


def _layouts(
    layout: Layout, shapes: Any, axes: Any, mesh_shape: Mapping[str, int]
) -> tuple[ArrayLayout, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = []
    for (path, leaf), dims in zip(leaves, names, strict=True):
        name = ".".join(str(getattr(entry, "key", entry)) for entry in path)
        split = tuple(layout.split(dim) for dim in dims)
        found.append(_laid_out(name, leaf.shape, split, leaf.dtype.itemsize, mesh_shape))
    return tuple(found)


def _laid_out(
    name: str,
    shape: tuple[int, ...],
    split: tuple[tuple[str, ...], ...],
    itemsize: int,
    mesh_shape: Mapping[str, int],
) -> ArrayLayout:
    split = tuple(tuple(axis for axis in each if mesh_shape[axis] > 1) for each in split)
    parts = [math.prod(mesh_shape[axis] for axis in each) for each in split]
    sizes = (-(-size // n) for size, n in zip(shape, parts, strict=True))
    return ArrayLayout(name, shape, split, math.prod(sizes) * itemsize)


def passing(recipe: Recipe, mesh_shape: Mapping[str, int]) -> tuple[ArrayLayout, ...]:
    """What passes between layers in one pass over a part of the batch: the residual stream and
    the slots that experts read. Whole shapes, bytes on one device."""
    layout, model, batch = Layout.of(recipe.mesh), recipe.model, recipe.batch
    rows = batch.rows // batch.accumulate // (recipe.pipeline.microbatches or 1)
    itemsize = 2 if model.activation_dtype == "bfloat16" else 4
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["the residual stream"] = (rows, batch.row_tokens, model.model_dim)
    if (moe := recipe.moe) is not None:
        groups = rows * batch.row_tokens // moe.group_tokens
        shapes["tokens by expert"] = (moe.num_experts, groups, capacity(moe), model.model_dim)
    return tuple(
        _laid_out(
            name,
            shape,
            tuple(
                layout.split_of(dim, size, mesh_shape)
                for dim, size in zip(arrays.ACTIVATIONS[name], shape, strict=True)
            ),
            itemsize,
            mesh_shape,
        )
        for name, shape in shapes.items()
    )


def by_group(
    recipe: Recipe, state: StateBytes, mesh_shape: Mapping[str, int], temporaries: int
) -> dict[str, int]:
    """What state and temporaries take of one device, by group; adds up to both.

    Gradients are float32 and complete before the update, one set as large as the weights (a second
    one while parts accumulate). Compilers do not separate them from other temporaries, so they are
    taken out by arithmetic. Where that leaves less than one residual stream and its slots, part of
    these arrays is in on-chip memory, which does not count, and they stay one group.
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
