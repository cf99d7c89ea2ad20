"""The layout of arrays: logical axes of parameters and activations, laid over a mesh (GSPMD 2D).

Parameters and activations carry logical names; a `Layout` holds the recipe's sharding table
(`mesh.rules`) and nothing else knows the mesh. It is a value that modules are given, never a
global. Activations are constrained against the mesh that `jax.set_mesh` made current (the form
that jax 0.10 to 0.12 share); without one, or on one device, `constrain` does nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli.config import schema
from glamcli.config.devices import Rules
from glamcli.config.sharding import Axes, table

Tree = Any
"""A nested dict of arrays, shapes or axes."""


@dataclass(frozen=True)
class Layout:
    """A sharding table. Hashable, so that compiled functions may depend on it."""

    rules: Rules
    expert_sums: Literal["float32", "bfloat16"] = "float32"
    """`mesh.expert_sums`."""

    @classmethod
    def of(cls, mesh: schema.Mesh) -> Layout:
        """The table of a recipe."""
        return cls(table(mesh), mesh.expert_sums)

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The leading mesh axes of rows, up to the first that experts are split over."""
        experts = self.split("expert")
        return tuple(itertools.takewhile(lambda axis: axis not in experts, self.split("batch")))

    def without(self, over: tuple[str, ...]) -> Layout:
        """The table for the inside of an array that is already split over these mesh axes."""
        fields = type(self.rules).model_fields
        left = {name: tuple(a for a in self.split(name) if a not in over) for name in fields}
        return replace(self, rules=self.rules.model_copy(update=left))

    def split(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over."""
        return () if name is None else getattr(self.rules, name)

    def parts(self, name: str | None, mesh_shape: Mapping[str, int]) -> int:
        """How many parts it is split into."""
        return math.prod(mesh_shape[axis] for axis in self.split(name))

    def here(self, name: str | None, size: int) -> tuple[str, ...]:
        """The axes of the current mesh that a dimension of this size is split over."""
        if num_devices() == 1:
            return ()
        return self.split_of(name, size, jax.sharding.get_abstract_mesh().shape)

    def num_parts(self, shape: tuple[int, ...], axes: Axes) -> int:
        """How many parts an activation of this shape has on the current mesh."""
        mesh = jax.sharding.get_abstract_mesh()
        split = [axis for each in zip(axes, shape, strict=True) for axis in self.here(*each)]
        return math.prod(mesh.shape[axis] for axis in split)

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*map(self.split, axes))

    def split_of(
        self, name: str | None, size: int, mesh_shape: Mapping[str, int]
    ) -> tuple[str, ...]:
        """The mesh axes that a dimension of this size is split over: as many as divide it."""
        return dividing(self.split(name), size, mesh_shape)

    def sharding(self, mesh: Mesh, axes: Axes) -> NamedSharding:
        """The sharding of an array with these logical axes on `mesh`."""
        return NamedSharding(mesh, self.spec(axes))

    def shardings(self, mesh: Mesh, axes_tree: Any) -> Any:
        """The same for every leaf of a nested dict of axes tuples."""
        return jax.tree.map(lambda axes: self.sharding(mesh, axes), axes_tree, is_leaf=_is_axes)

    def bytes_per_device(self, mesh_shape: Mapping[str, int], shapes: Any, axes_tree: Any) -> int:
        """Bytes of these arrays on one device of such a mesh."""
        found = 0
        axes = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
        for leaf, names in zip(jax.tree.leaves(shapes), axes, strict=True):
            parts = math.prod(self.parts(name, mesh_shape) for name in names)
            found += leaf.size * leaf.dtype.itemsize // parts
        return found

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`x`, with its sharding on the current mesh fixed.

        A dimension is split over as many of its mesh axes, first ones first, as divide it (one
        row of a batch in generation stays whole): activations adapt, only weights are refused
        (`config/sharding.py`).
        """
        if len(axes) != x.ndim:
            raise ValueError(f"{len(axes)} axes for an array of {x.ndim} dimensions")
        if num_devices() == 1:
            return x
        spec = PartitionSpec(*map(self.here, axes, x.shape))
        return jax.lax.with_sharding_constraint(x, spec)

    def on_each_device(
        self,
        run: Callable[..., Any],
        in_axes: Sequence[Axes],
        out_axes: Any,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> Callable[..., Any]:
        """`run` on every device's own part of its arguments (`shard_map`).

        Dimensions of one name are split alike: as the first array that has the name allows.
        `sizes` are those of names that only results have. Without a mesh it is `run` itself.
        """
        if num_devices() == 1:
            return run

        def mapped(*arrays: Array) -> Any:
            entries: dict[str | None, Any] = {None: None}
            entries |= {name: self.here(name, size) for name, size in sizes.items()}
            for axes, x in zip(in_axes, arrays, strict=True):
                for name, size in zip(axes, x.shape, strict=True):
                    entries.setdefault(name, self.here(name, size))

            def spec(axes: Axes) -> PartitionSpec:
                return PartitionSpec(*(entries[name] for name in axes))

            out_specs = jax.tree.map(spec, out_axes, is_leaf=_is_axes)
            in_specs = tuple(spec(axes) for axes in in_axes)
            # Not checked: which results are equal on several devices is known from the table.
            split = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return split(*arrays)

        return mapped

    def within(
        self, over: tuple[str, ...], names: tuple[str, ...], sizes: Mapping[str, int]
    ) -> Axes:
        """These names, None for those that are split over other mesh axes as well."""
        inside = (set(self.here(name, sizes[name])) <= set(over) for name in names)
        return tuple(name if fits else None for name, fits in zip(names, inside, strict=True))

    def summed(
        self, x: Array, over: tuple[str, ...], axes: Axes, sizes: Mapping[str, int]
    ) -> Array:
        """Inside `on_each_device`: the sum over mesh axes of what every device has.

        A dimension whose name is in `sizes` is left split (reduce-scatter); all its mesh axes
        must be among those summed over (`within`).
        """
        left = over
        for dim, name in enumerate(axes):
            if name is not None and name in sizes and (split := self.here(name, sizes[name])):
                x = jax.lax.psum_scatter(x, split, scatter_dimension=dim, tiled=True)
                left = tuple(axis for axis in left if axis not in split)
        return jax.lax.psum(x, left) if left else x


GLAM = Layout.of(schema.Mesh())
"""The default table: what a recipe without `mesh.rules` has."""


def first_row(split: tuple[str, ...], part: Array) -> Array | int:
    """Inside `on_each_device`: the number in the whole array of this part's first row."""
    return part.shape[0] * jax.lax.axis_index(split) if split else 0


def num_devices() -> int:
    """Devices of the current mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def dividing(axes: tuple[str, ...], size: int, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """As many of these mesh axes, first ones first, as divide the size."""
    while size % math.prod(mesh_shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)
