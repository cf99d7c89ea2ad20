"""The time of kernels: custom calls, which XLA does not estimate.

A kernel may state how many operations and bytes one run of it has (`cost_estimate` of Pallas; the
compiler's own kernels do). How near it comes to a chip's peak is in `config/chips.toml`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from glamcli.config.chips import Chip
from glamcli.plan.hlo import Instruction, Module

_TARGET = 'custom_call_target="tpu_custom_call"'
_COST = r'"cost_estimate":\{([^}]*)\}'


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program; operations and bytes are those of a run on one device, None where
    the kernel does not state them."""

    name: str
    flops: float | None
    bytes: float | None

    def seconds(self, chip: Chip) -> float | None:
        """The longer of computing and reading and writing; None for a kernel without a cost."""
        if self.flops is None or self.bytes is None:
            return None
        compute = self.flops / (chip.peak * chip.kernel_efficiency(self.name))
        return chip.devices * max(compute, self.bytes / chip.hbm)


def kernels(module: Module, line: Instruction) -> Iterator[Kernel]:
    """The kernels that an instruction is, or that are inlined into it."""
    if line.opcode == "custom-call" and _TARGET in line.rest:
        cost = line.find(_COST)
        counts = dict(re.findall(r'"(\w+)":"(\d+)"', cost or ""))
        flops, size = (float(counts.get(key, 0)) for key in ("flops", "bytes_accessed"))
        yield Kernel(_name(line), *((flops, size) if flops or size else (None, None)))
    for callee in line.inlined:
        for inner in module.computations[callee]:
            yield from kernels(module, inner)


def _name(line: Instruction) -> str:
    """What its author calls it: the last word of `.../transpose(jvp(name))/pallas_call`."""
    named = re.search(r"([\w.-]+)\)*$", line.op_name.removesuffix("/pallas_call"))
    return named[1] if named else re.sub(r"\.\d+$", "", line.name)
