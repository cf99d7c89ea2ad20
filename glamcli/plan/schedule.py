"""How long a compiled step takes, read from its schedule: an estimate, never a measurement.

XLA notes for every fusion how many cycles it expects, kernels state their operations and bytes, and
instructions are written in the order they will run. That order is walked with one clock for the
core and one per network (docs/planning.md).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from glamcli.errors import PlanError
from glamcli.plan.collectives import Collective, at
from glamcli.plan.hlo import Instruction, Module, arrays
from glamcli.plan.kernels import kernels
from glamcli.plan.network import HOP_SECONDS, Network

_CYCLES = r'"estimated_cycles":"(\d+)"'
_ABSURD_CYCLES = 2**62
"""From here on an estimate says that the compiler has none: libtpu 0.0.52 writes the largest
integer for some ragged products."""
_RENDEZVOUS = r'_rendezvous="([^"]*)"'
_ONE_HOT = re.compile(r"experts_.*(GSEC|_one_hot|/ne\b)")
SCOPES = ("attention", "experts", "router", "ffn", "softmax", "optimizer", "embed", "norm")


@dataclass
class Time:
    """Seconds of one step on one device."""

    compute: float = 0.0
    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """waiting for the network, by mesh axes."""
    network: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """busy network, hidden or not, by mesh axes."""
    scopes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """computing, by part of the model."""
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """the part of computing that kernels take, by kernel."""
    unpriced: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """runs of kernels that do not state their cost and count as no time, by kernel."""

    @property
    def waiting(self) -> float:
        return sum(self.exposed.values())

    @property
    def total(self) -> float:
        return self.compute + self.waiting

    def add(self, other: Time, times: int) -> None:
        """Adds what runs so many times."""
        self.compute += times * other.compute
        for name in ("exposed", "network", "scopes", "kernels", "unpriced"):
            for key, amount in getattr(other, name).items():
                getattr(self, name)[key] += times * amount


def step_time(module: Module, network: Network) -> Time:
    """The time of one run of the module's entry.

    Raises: PlanError when the compiler's estimate of an instruction is absurd.
    """
    return _Clock(module, network).run(module.entry)


class _Clock:
    def __init__(self, module: Module, network: Network):
        self._module, self._network = module, network
        chip = network.chip
        assert chip.clock is not None
        self._second = 1 / chip.clock
        self._copied = chip.devices / chip.hbm
        self.run = cache(self._run)

    def _run(self, computation: str) -> Time:
        """The time of one run of a computation."""
        total = Time()
        now = 0.0
        # When each direction of a network is free again.
        free: defaultdict[tuple[str, bool], float] = defaultdict(float)
        finish: dict[str, tuple[float, str]] = {}  # by what awaits it
        answers: dict[str, str] = {}
        seen: set[str] = set()
        for line in self._module.computations[computation]:
            for key, ways, seconds in self._transfers(line, seen):
                until = max(now, *(free[key, way] for way in ways)) + seconds
                for way in ways:
                    free[key, way] = until
                total.network[key] += seconds
                if line.opcode.endswith("-start"):
                    finish[line.name] = (until, key)
                elif line.opcode == "send":  # to other slices; awaited by its answer
                    finish[line.find(_RENDEZVOUS) or line.name] = (until, key)
                else:
                    total.exposed[key] += until - now
                    now = until
            if line.opcode == "async-update":  # stands between a start and its end
                for name in finish.keys() & set(line.operands):
                    finish[line.name] = finish.pop(name)
            if line.opcode == "recv":
                answers[line.name] = line.find(_RENDEZVOUS) or line.name
            elif line.opcode.endswith("-done"):
                for operand in (answers.get(name, name) for name in line.operands):
                    until, key = finish.pop(operand, (now, ""))
                    if until > now:
                        total.exposed[key] += until - now
                        now = until
            elif inner := self._inside(line):
                for time, times in inner:
                    total.add(time, times)
                    now += times * time.total
            else:
                now += self._compute(line, total)
        return total

    def _compute(self, line: Instruction, total: Time) -> float:
        """Adds an instruction that computes to `total`; its seconds."""
        cycles = int(line.find(_CYCLES) or 0)
        if cycles >= _ABSURD_CYCLES:
            raise PlanError(
                f"the compiler has no usable estimate of `{line.op_name or line.name}`: it expects "
                f"{cycles:,} cycles of `{line.name}`, so the step has no time",
                "plan for another kind of TPU, or with another `moe.dispatch`",
            )
        seconds = cycles * self._second
        in_kernels = 0.0
        for kernel in kernels(self._module, line):
            if (own := kernel.seconds(self._network.chip)) is not None:
                total.kernels[kernel.name] += own
                in_kernels += own
            elif not cycles:
                total.unpriced[kernel.name] += 1
        # A fusion around a kernel may have an estimate, which leaves the kernel out.
        seconds = max(seconds, in_kernels)
        if seconds:
            total.compute += seconds
            total.scopes[scope_of(line.op_name)] += seconds
        return seconds

    def _inside(self, line: Instruction) -> list[tuple[Time, int]]:
        """What an instruction runs, and how often; of a conditional the longest branch."""
        if line.opcode == "while":
            rounds = self._module.trips(line)
            return [(self.run(name), rounds) for name in line.called("body", "condition")]
        runs = [self.run(name) for name in line.branches]
        return [(max(runs, key=lambda time: time.total), 1)] if runs else []

    def _transfers(
        self, line: Instruction, seen: set[str]
    ) -> Iterator[tuple[str, tuple[bool, ...], float]]:
        """(network, directions, seconds) of what an instruction sends."""
        if line.opcode in ("copy-start", "slice-start"):  # memory to core, or back
            sizes = (math.prod(dims) * bits / 8 for bits, dims in arrays(line.result) if dims)
            moved = min(sizes, default=0.0)
            yield "memory", (True,), moved * self._copied
            return
        for each, channel in at(self._module, line, self._network.shape):
            if channel is None or channel not in seen:
                seen.add(channel or "")
                if each.axes:
                    ways = (True, False)
                    if each.pairs:  # most go one way around; one pair closes the ring
                        ways = (2 * sum(a < b for a, b in each.pairs) > len(each.pairs),)
                    yield "+".join(each.axes), ways, transfer_seconds(each, self._network)


def transfer_seconds(each: Collective, network: Network) -> float:
    """How long one collective takes when it has its network for itself (docs/planning.md)."""
    rate, latency, longest = network.rate(each.axes)
    size, n = float(each.bytes), max(each.group, 1)
    if each.kind == "collective-permute":  # from a device to the next one
        chip = network.chip
        link = (chip.dcn if "slice" in each.axes else chip.link) / chip.devices
        return size / link + HOP_SECONDS
    share = (n - 1) / n
    if each.kind == "all-reduce":
        return 2 * (size * share / rate + latency)
    if each.kind in ("all-to-all", "ragged-all-to-all"):
        return size * max(share, longest / 4) / rate + latency
    return size * share / rate + latency


def scope_of(op_name: str) -> str:
    """The part of the model that an operation belongs to; `dispatch` are the one-hot products that
    move tokens to experts and back."""
    parts = op_name.split("/")
    if _ONE_HOT.search(op_name):
        return "dispatch"
    for scope in SCOPES:
        if any(part.startswith(scope) or f"({scope})" in part for part in parts):
            return scope
    return "other"


def by_kind(found: list[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
    """(kind, mesh axes, executions, bytes) per step, most bytes first."""
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sizes = counts.copy()
    for each in found:
        counts[each.kind, each.axes] += each.count
        sizes[each.kind, each.axes] += each.count * each.bytes
    return [(*key, counts[key], size) for key, size in sizes.most_common()]
