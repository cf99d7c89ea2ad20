"""The collectives of a compiled program, read from its optimized HLO text.

`collectives(compiled.as_text(), mesh.shape)` lists every collective with the mesh axes it runs
over, the bytes one device contributes or receives, and how often a run of the program executes
it (trip counts of loops multiplied). Called by tests of layouts and by the planner.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from glamcli.plan.hlo import Instruction, Module, arrays, first_type

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as each device sees it."""

    kind: str
    axes: tuple[str, ...]
    """mesh axes along which the devices of a group differ, in the order of the mesh."""
    group: int
    """devices in a group."""
    bytes: int
    """per execution, on one device: the whole of what a group gathers or of what it scatters
    (all-gather: the result; reduce-scatter, all-reduce, all-to-all and permute: the operand)."""
    count: int
    """executions in one run of the program; a loop of unknown length counts as one round."""
    shapes: tuple[tuple[int, ...], ...]
    """of the same arrays that `bytes` counts."""
    name: str
    """the path of `jax.named_scope`s that it belongs to, as far as XLA kept it."""
    pairs: tuple[tuple[int, int], ...] = ()
    """of a collective-permute: (sender, receiver), in device numbers."""


def collectives(hlo: str | Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of an optimized HLO module, in the order of its text.

    Devices are numbered as in the flattened mesh (what `jax.jit` makes of it).
    """
    module = Module(hlo) if isinstance(hlo, str) else hlo
    found = []
    for name, count in module.counts.items():
        seen = set()
        for line in module.computations[name]:
            for each, channel in at(module, line, mesh_shape):
                # On TPU one collective may be spread over several fusions, all with its channel.
                # Not so outside of fusions: all that `shard_map` asks for have channel 1.
                part = (channel, each) if channel is not None and line.inlined else None
                if part is None or part not in seen:
                    found.append(replace(each, count=count))
                    seen.add(part)
    return found


def at(
    module: Module, line: Instruction, mesh_shape: Mapping[str, int]
) -> Iterator[tuple[Collective, str | None]]:
    """The collectives of an instruction and of what is inlined into it, with their channels."""
    for callee in line.inlined:
        for inner in module.computations[callee]:
            for each, channel in at(module, inner, mesh_shape):
                if "all-reduce-scatter" in callee:  # how TPUs write a reduce-scatter
                    each = replace(each, kind="reduce-scatter", name=line.op_name or each.name)
                yield each, channel
    if line.opcode == "send" and (kind := line.find(r'_xla_megascale_transfer_type="(\w+)"')):
        # What one slice of TPUs sends to the others, over the hosts' network: TPU compilers write
        # it as a transfer to the host, which carries out the rest.
        kind, group = kind.lower().replace("_", "-"), mesh_shape.get("slice", 1)
        found = arrays(line.result)[:1]
        yield _of_arrays(kind, ("slice",), group, found, line), line.channel
    if (kind := line.opcode.removesuffix("-start")) in KINDS:
        yield _collective(kind, line, mesh_shape), line.channel


def _collective(kind: str, line: Instruction, mesh_shape: Mapping[str, int]) -> Collective:
    counted = line.result
    if line.opcode.endswith("-start") and kind != "all-reduce":  # (operand, result, ...)
        _, after = first_type(line.result[1:])
        counted, _ = first_type(after.removeprefix(",").lstrip())
    found = arrays(counted)
    groups = _groups(line.rest, math.prod(mesh_shape.values()))
    axes, group = _axes(groups, mesh_shape)
    if kind == "reduce-scatter":  # the operands, from the results
        dim = int(line.find(r"dimensions=\{(\d+)\}") or 0)
        found = [(b, (*s[:dim], s[dim] * group, *s[dim + 1 :])) for b, s in found]
    pairs = tuple((a, b) for a, b in groups) if kind == "collective-permute" else ()
    return _of_arrays(kind, axes, group, found, line, pairs)


def _of_arrays(
    kind: str,
    axes: tuple[str, ...],
    group: int,
    found: list[tuple[int, tuple[int, ...]]],
    line: Instruction,
    pairs: tuple[tuple[int, int], ...] = (),
) -> Collective:
    num_bytes = sum(math.prod(shape) * bits for bits, shape in found) // 8
    shapes = tuple(shape for _, shape in found)
    return Collective(kind, axes, group, num_bytes, 1, shapes, line.op_name, pairs)


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Groups of devices that exchange data, from any of the forms that XLA writes."""
    if match := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes):
        return [list(pair) for pair in _lists(match[1]) if pair[0] != pair[1]]
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return _lists(match[1])
    if match := re.search(rf"replica_groups=(\[[\d,]+\])<={_IOTA}", attributes):
        return _iota(match[2], match[3]).reshape(_ints(match[1])).tolist()
    if match := _MESH_GROUPS.search(attributes):
        return _mesh_groups(match)
    return [list(range(num_devices))]


_IOTA = r"(\[[\d,]+\])(?:T\(([\d,]+)\))?"
"""0, 1, ... in this shape, and how it is transposed: `[2,4]T(1,0)`."""

# `mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x':(2)2,'y'}`: the y axis and the minor half of x.
_MESH_GROUPS = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}"
)


def _mesh_groups(match: re.Match[str]) -> list[list[int]]:
    axes, shape, order, inner = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    used = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", inner)
    num_devices = math.prod(sizes.values())
    ids = _iota(shape or f"[{num_devices}]", order)
    dims: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        parts = [(int(before or 1), int(part or size)) for n, before, part in used if n == name]
        before, part = parts[0] if parts else (size, 1)
        inside.append(len(dims) + 1)
        dims += [before, part, size // before // part]
    outside = [dim for dim in range(len(dims)) if dim not in inside]
    grid = ids.reshape(dims).transpose(*outside, *inside)
    return grid.reshape(-1, math.prod(dims[dim] for dim in inside)).tolist()


def _iota(shape: str, order: str | None) -> np.ndarray:
    """The numbers 0, 1, ... in this shape, transposed, flattened."""
    sizes = _ints(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_ints(order)) if order else ids).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_ints(part) for part in re.findall(r"\{([\d, ]*)\}", text)]


def _axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which members of a group differ, and the size of a group."""
    sizes = tuple(mesh_shape.values())
    differ = np.zeros(len(sizes), bool)
    for length in {len(group) for group in groups}:
        alike = np.array([group for group in groups if len(group) == length])
        coords = np.stack(np.unravel_index(alike, sizes))  # [mesh axis, group, member]
        differ |= np.any(coords != coords[:, :, :1], axis=(1, 2))
    names = tuple(name for name, used in zip(mesh_shape, differ, strict=True) if used)
    return names, max((len(group) for group in groups), default=1)
