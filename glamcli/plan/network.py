"""How fast devices of a mesh reach each other: links of a slice, hosts' network between slices.

Which dimensions of the slice a mesh axis covers is read from the coordinates of the devices; for
arithmetic without devices it is assumed that the mesh fills the slice from its last dimension.
"""

import math

import numpy as np
from jax.sharding import Mesh

from glamcli.plan.topology import Target

HOP_SECONDS = 1e-6
"""Latency from chip to neighbour inside a slice (jax-ml.github.io/scaling-book)."""


class Network:
    """How fast the devices of a mesh reach each other along its axes."""

    def __init__(self, target: Target, mesh: Mesh | None, mesh_shape: dict[str, int]):
        assert target.chip is not None
        self.target, self.chip = target, target.chip
        self.shape = mesh_shape
        self._mesh = mesh

    def rate(self, axes: tuple[str, ...]) -> tuple[float, float, float]:
        """(bytes per second in and out of a device, seconds of latency, the longest ring) of
        collectives over these mesh axes."""
        chip = self.chip
        group = math.prod(self.shape[axis] for axis in axes)
        if "slice" in axes:
            return chip.dcn / chip.devices, 1e-5, group
        if self.target.kind == "gpu":
            # In one host where the axes end the mesh.
            first = min(map(list(self.shape).index, axes))
            inside = math.prod(list(self.shape.values())[first:]) <= chip.per_host
            return (chip.link, 3e-6, group) if inside else (chip.dcn, 1e-5, group)
        spans = self._spans(axes)
        rate = sum(chip.link * (2 if wraps else 1) for _, wraps in spans)
        if not rate:  # cores of one chip
            return chip.hbm / 2, HOP_SECONDS, group
        hops = sum(size // 2 if wraps else size - 1 for size, wraps in spans)
        longest = max(size * (1 if wraps else 2) for size, wraps in spans)
        return rate / chip.devices, hops * HOP_SECONDS, longest

    def _spans(self, axes: tuple[str, ...]) -> list[tuple[int, bool]]:
        """(extent, whether it is a ring) in every dimension of the slice that a group covers."""
        if self._mesh is None:
            return self._assumed(axes)
        index = tuple(slice(None) if axis in axes else 0 for axis in self._mesh.axis_names)
        group = np.asarray(self._mesh.devices[index]).reshape(-1)
        coords = np.array([device.coords for device in group])
        found = []
        for dim, length in enumerate(self.target.shape):
            extent = len(set(coords[:, dim].tolist()))
            if extent > 1:
                found.append((extent, extent == length and self._is_ring(length)))
        return found

    def _is_ring(self, length: int) -> bool:
        if self.chip.wraps == "cubes":
            return all(side % 4 == 0 for side in self.target.shape)
        return length == self.chip.wraps

    def _assumed(self, axes: tuple[str, ...]) -> list[tuple[int, bool]]:
        """The same without devices: as if the mesh filled the slice's dimensions from its end."""
        left = list(self.target.shape)
        found: list[tuple[int, bool]] = []
        for axis in reversed(list(self.shape)):
            size = self.shape[axis]
            if axis == "slice" or size == 1:
                continue
            while size > 1 and left:
                part = math.gcd(size, left[-1])
                if axis in axes and part > 1:
                    whole = part == self.target.shape[len(left) - 1]
                    found.append((part, whole and self._is_ring(part)))
                size //= part
                left[-1] //= part
                if left[-1] == 1:
                    left.pop()
                elif part == 1:
                    break
        return found
