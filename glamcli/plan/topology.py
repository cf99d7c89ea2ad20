"""From a target's name to devices: TPU slices that are only described, GPUs, CPUs, what is here.

`v4-2048` is one slice, `2xv5e-256` two of them over the slow network, `8xh100` GPUs, `cpu:8`
simulated devices, `local` the devices of this machine. Facts about chips are in
`config/chips.toml`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax

from glamcli.config.chips import Chip
from glamcli.config.nearest import did_you_mean, divisors
from glamcli.errors import PlanError

MAX_GPUS = 16384


class NoCompiler(PlanError):
    """The compiler for a target is not installed."""


@dataclass(frozen=True)
class Target:
    """Devices to plan for. `shape` is a slice's grid of chips, empty off TPUs."""

    name: str
    kind: str
    """`tpu`, `gpu`, `cpu` or `local`."""
    chip: Chip | None = None
    num_chips: int = 0
    shape: tuple[int, ...] = ()
    num_slices: int = 1

    @property
    def num_devices(self) -> int:
        return self.num_chips * (self.chip.devices if self.chip else 1)

    @property
    def words(self) -> str:
        """What the name stands for."""
        if self.chip is None:
            return (
                f"{self.num_chips} simulated CPU devices" if self.kind == "cpu" else "this machine"
            )
        if self.kind == "gpu":
            return f"{self.num_chips} {self.chip.name.upper()} GPUs"
        grid = "x".join(map(str, self.shape))
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        chips = self.num_chips // self.num_slices
        return f"{slices}{chips:,} TPU {self.chip.name} chip{'s' * (chips > 1)}, {grid}"


def parse_target(name: str, chips: dict[str, Chip]) -> Target:
    """The target of a name.

    Raises: PlanError with the nearest name there is.
    """
    text = name.strip().lower()
    if text == "local":
        return Target("local", "local")
    if match := re.fullmatch(r"cpu:(\d+)", text):
        if not 0 < int(match[1]) <= 4096:
            raise PlanError(f"`{name}`: between 1 and 4,096 CPU devices can be simulated")
        return Target(text, "cpu", num_chips=int(match[1]))
    if match := re.fullmatch(r"(\d+)x([a-z]+\d+)", text):
        chip = chips.get(match[2])
        if chip is not None and chip.family == "gpu" and int(match[1]) > 0:
            return Target(text, "gpu", chip, int(match[1]))
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z\d]+)-(\d+)", text):
        slices, kind, number = int(match[1] or 1), match[2], int(match[3])
        chip = next((c for c in chips.values() if kind in (c.name, *c.also)), None)
        if chip is not None and chip.family == "tpu" and slices > 0:
            return _slice(name, chip, number, slices)
    raise PlanError(f"unknown target `{name}`", _nearest(text, chips))


def chips_of_kind(name: str, chips: dict[str, Chip]) -> dict[str, Chip]:
    """The section of the table that a kind's name without a size stands for.

    Raises: PlanError when it names no TPU.
    """
    text = name.strip().lower()
    found = {key: chip for key, chip in chips.items() if text in (key, *chip.also)}
    if not any(chip.family == "tpu" for chip in found.values()):
        kinds = ", ".join(f"`{key}`" for key, chip in chips.items() if chip.family == "tpu")
        raise PlanError(
            f"`--all-targets` goes through the sizes of a kind of TPU, and `{name}` is not one",
            f"`--target` may then be {kinds}, or left out for all of them",
        )
    return found


def slice_sizes(chip: Chip) -> list[int]:
    """Numbers of chips in a slice, from one host's to a pod, powers of two."""
    smallest = 4 if chip.torus == 3 or chip.name_counts == "cores" else 1
    powers = (2**n for n in range(15))
    return [n for n in powers if smallest <= n <= chip.max_chips and _grid(chip, n)]


def target_of(chip: Chip, num_chips: int, num_slices: int = 1) -> Target:
    """Slices of so many chips each."""
    name = f"{num_slices}x" * (num_slices > 1) + f"{chip.name}-{num_chips * chip.names_per_chip}"
    return Target(name, "tpu", chip, num_chips * num_slices, _grid(chip, num_chips), num_slices)


def larger_targets(target: Target) -> Iterator[Target]:
    """Targets of the same kind with more chips, smallest first."""
    chip, num_chips = target.chip, target.num_chips
    if chip is not None and target.kind == "gpu":
        while (num_chips := 1 << num_chips.bit_length()) <= MAX_GPUS:
            yield Target(f"{num_chips}x{chip.name}", "gpu", chip, num_chips)
    elif chip is not None:
        for size in slice_sizes(chip):
            if size * target.num_slices > num_chips:
                yield target_of(chip, size, target.num_slices)


def _slice(name: str, chip: Chip, number: int, slices: int) -> Target:
    """Slices by the number in their name. Raises: PlanError when there are none of this size."""
    num_chips, rest = divmod(number, chip.names_per_chip)
    if rest or num_chips > chip.max_chips or not _grid(chip, num_chips):
        known = [n * chip.names_per_chip for n in slice_sizes(chip)]
        near = sorted(sorted(known, key=lambda n: abs(math.log(n / max(number, 1))))[:2])
        names = " or ".join(f"`{chip.name}-{n}`" for n in near)
        counted = f" ({chip.name} names count {chip.name_counts})"
        raise PlanError(f"there is no slice `{name}`{counted}", f"the nearest sizes are {names}")
    return target_of(chip, num_chips, slices)


def _grid(chip: Chip, num_chips: int) -> tuple[int, ...]:
    """The usual grid of so many chips; () when none is offered.

    Flat networks come in rectangles of sides 1:1 and 1:2. Others are made of cubes of 4 x 4 x 4
    in the most compact box, below which there are a few fixed ones.
    """
    if chip.torus == 2:
        if num_chips in (0, 2) or num_chips & (num_chips - 1):
            return ()
        half, rest = divmod(num_chips.bit_length() - 1, 2)
        return (2**half, 2 ** (half + rest))
    small = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    if num_chips in small:
        return small[num_chips]
    if num_chips < 64 or num_chips % 64:
        return ()
    cubes = num_chips // 64
    pairs = product(divisors(cubes), repeat=2)
    boxes = (sorted((a, b, cubes // a // b)) for a, b in pairs if cubes % (a * b) == 0)
    return tuple(4 * side for side in min(boxes, key=sum))


def _nearest(text: str, chips: dict[str, Chip]) -> str | None:
    names = ["local", "cpu:8"]
    for chip in chips.values():
        if chip.family == "gpu":
            names += [f"{n}x{chip.name}" for n in (1, 8, 16)]
        else:
            names += [f"{chip.name}-{n * chip.names_per_chip}" for n in slice_sizes(chip)]
    examples = "for example `v4-2048`, `v5e-64`, `2xv5e-256`, `8xh100`, `cpu:8`, `local`"
    return did_you_mean(text, names, examples, cutoff=0.55)


def devices(target: Target) -> Sequence[Any]:
    """The target's devices, in the form that meshes are made of; for TPUs only described.

    Raises: NoCompiler without libtpu; PlanError when it does not know the slice.
    """
    if target.chip is None:
        found = jax.devices()
        if target.kind == "cpu" and len(found) != target.num_chips:
            raise PlanError(f"`{target.name}` needs a process of its own with that many devices")
        return found
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": target.chip.config} if target.chip.config else {}
    if target.num_slices > 1:
        options["num_slices"] = target.num_slices
    grid = "x".join(map(str, target.shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.chip.topology}:{grid}", **options
        )
    except Exception as error:
        # jax says "JAX TPU support not installed", or that it is "Unable to find libtpu".
        if re.search("not installed|find libtpu", str(error)):
            raise NoCompiler(
                "the TPU compiler (libtpu) is not installed",
                "pip install '.[plan]' in the folder of glam's source",
            ) from error
        first = str(error).splitlines()[0]
        raise PlanError(f"the TPU compiler refuses `{target.name}`: {first}") from error
    return found.devices
