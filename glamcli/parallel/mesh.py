"""From the recipe's mesh to devices. What is split over which axis is in `axes.py`."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding

from glamcli.config import schema
from glamcli.config.sharding import MESH_AXES
from glamcli.errors import PlanError


def mesh_shape(mesh: schema.Mesh, num_devices: int) -> dict[str, int]:
    """The size of every mesh axis, with `data: auto` worked out.

    Raises:
        PlanError: if the axes do not multiply to the devices there are.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    others = prod(size for axis, size in sizes.items() if axis != "data")
    data = num_devices // others if sizes["data"] == "auto" else sizes["data"]
    if others * data != num_devices:
        product = " x ".join(str(size) for size in sizes.values() if size != 1) or "1"
        raise PlanError(
            f"the mesh asks for {product} devices ({', '.join(MESH_AXES)}), found {num_devices}",
            hint=_proposal(sizes, num_devices),
            key="mesh.data",
        )
    return sizes | {"data": data}


def make_mesh(mesh: schema.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The recipe's mesh over `devices` (all of them by default).

    Raises: PlanError if the axes do not multiply to them, or `mesh.slice` is not theirs.
    """
    devices = jax.devices() if devices is None else devices
    slice_size, *inner = mesh_shape(mesh, len(devices)).values()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A dimension of the network may be shared by two axes: `jax.make_mesh` allows that on some
    # TPUs only, and refuses several slices.
    split: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = create_device_mesh((slice_size, *inner), devices, **split)
    elif slice_size == slices:
        across = (slices, *(1 for _ in inner))
        grid = create_hybrid_device_mesh((1, *inner), across, devices, **split)
    else:
        raise PlanError(
            f"these devices are {slices} slices, but `mesh.slice` is {slice_size}",
            hint=f"use `mesh.slice` {slices}",
            key="mesh.slice",
        )
    # Layouts are constraints that the compiler completes (GSPMD), not parts of types.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def with_mesh_of(arrays: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the mesh that these arrays are spread over as the current one.

    Scoring and generation run where the weights are. Weights on one device need no mesh.
    """
    sharding = jax.tree.leaves(arrays)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return run

    def called(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            return run(*args, **options)

    return called


def on_one_device(arrays: Any) -> bool:
    """Whether these arrays are whole on a single device."""
    return len(jax.tree.leaves(arrays)[0].sharding.device_set) == 1


def local_rows(sharding: Sharding, num_rows: int) -> tuple[range, ...]:
    """The rows of a batch that this process's devices hold, in order and without repetition.

    Rows of other processes may come between them, and others may hold the same rows.
    """
    held = sharding.addressable_devices_indices_map((num_rows,)).values()
    bounds = sorted({index[0].indices(num_rows)[:2] for index in held if index is not None})
    joined: list[range] = []
    for start, stop in bounds:
        if joined and joined[-1].stop == start:
            start = joined.pop().start
        joined.append(range(start, stop))
    return tuple(joined)


def global_batch(
    rows: Mapping[str, np.ndarray], here: Sequence[range], layout: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Arrays over the devices of all processes, of which this one gives the rows it has (`here`).

    `layout` has shape and sharding of every array; rows are split and nothing else.
    """
    numbers = np.concatenate([np.arange(block.start, block.stop) for block in here])

    def put(name: str) -> jax.Array:
        shape, sharding, mine = layout[name].shape, layout[name].sharding, rows[name]
        if sharding.is_fully_addressable:
            return jax.device_put(mine, sharding)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(numbers, start))
            return mine[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(name) for name in layout}


def _proposal(sizes: dict[str, Any], num_devices: int) -> str:
    """A mesh that fits: keep `model`, then `expert`, as far as they divide the devices."""
    left, found = num_devices, {}
    for axis in ("model", "expert", "stage", "slice"):
        found[axis] = max(n for n in range(1, sizes[axis] + 1) if left % n == 0)
        left //= found[axis]
    axes = ", ".join(f"`mesh.{axis}` {found[axis]}" for axis in reversed(found))
    return f"for {num_devices} devices use {axes} and `mesh.data` {left} (or auto)"


def whole(x: jax.Array) -> np.ndarray:
    """The array in this process's memory, also where other processes hold parts of it; all of
    them must then call this alike."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
