"""The table of accelerators, `chips.toml`: memory, speeds and prices of every kind of chip.

Read by `glam plan`, whose `--chips` reads a table of the user's own instead, and by runs, which
find their chip by the name that JAX gives to its devices.
"""

import json
import math
import re
import tomllib
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from glamcli.errors import PlanError
from glamcli.untrusted import parse_as, read_file

WATTS_PER_CHIP = 326.0
PUE = 1.11
"""Measured power of a system per TPU v4 chip, and the power usage effectiveness of the data centre:
all the power it draws over what its machines draw (GLaM, by the method of arXiv 2104.10350)."""

OTHER_KERNELS = 0.5
"""Share of the peak that a kernel reaches of which a table of chips says nothing: a guess."""

CHIPS_FILE = Path(__file__).with_name("chips.toml")


@dataclass(frozen=True)
class Chip:
    """One section of `chips.toml`, which documents the fields."""

    name: str
    family: str
    devices: int
    hbm_gib: float
    peak: float
    hbm: float
    link: float
    dcn: float
    usable_gib: float | None = None
    price: float | None = None
    clock: float | None = None
    topology: str = ""
    config: str | None = None
    also: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    name_counts: str = "chips"
    cores: int = 1
    torus: int = 0
    wraps: int | str = "cubes"
    max_chips: int = 0
    per_host: int = 0
    kernels: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def hbm_bytes(self) -> float:
        """Memory of one device."""
        return self.hbm_gib * 2**30 / self.devices

    @property
    def usable_bytes(self) -> float:
        """The part of it that a program may use."""
        return (self.usable_gib or self.hbm_gib) * 2**30 / self.devices

    @property
    def device_name(self) -> str:
        """What one JAX device is: a chip, or one of its cores."""
        return "chip" if self.devices == 1 else "core"

    @property
    def names_per_chip(self) -> int:
        """What the number in a slice's name counts, per chip: `v4-8` has 8 cores on 4 chips."""
        return self.cores if self.name_counts == "cores" else 1

    def kernel_efficiency(self, kernel: str) -> float:
        """Share of the peak at which a kernel computes, by the table or else a guess."""
        return self.kernels.get(kernel, OTHER_KERNELS)


def _chip(name: str, facts: Any) -> Chip:
    if not isinstance(facts, dict):
        raise ValueError(f"`{name}` is not a section")
    names = {key: tuple(facts.get(key, ())) for key in ("also", "kinds")}
    values: dict[str, Any] = {**facts, **names}
    chip = Chip(name=name, **values)
    for key in ("devices", "hbm_gib", "peak", "hbm", "link", "dcn", "cores"):
        if not 0 < getattr(chip, key) < math.inf:
            raise ValueError(f"`{name}.{key}` is {getattr(chip, key)}")
    chip = parse_as(Chip, json.dumps(asdict(chip)).encode())
    for kernel, share in chip.kernels.items():
        if not 0 < share <= 1:
            raise ValueError(f"`{name}.kernels.{kernel}` is {share}, and has to be a share of 1")
    return chip


def load_chips(path: Path = CHIPS_FILE) -> dict[str, Chip]:
    """The table of chips.

    Raises: PlanError when the file cannot be read, or a field of a section is missing, unknown, of
        another type, or a number that is not above 0 where it has to be.
    """
    try:
        sections = tomllib.loads(read_file(path).decode())
        return {name: _chip(name, facts) for name, facts in sections.items()}
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror or error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        what = re.sub(r"^.*__init__\(\) ", "", str(error))
        hint = f"{CHIPS_FILE} is an example"
        raise PlanError(f"{path} is not a table of chips: {what}", hint) from error


@cache
def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices JAX calls so; None for a CPU and for chips that the table lacks."""
    return next((chip for chip in load_chips().values() if device_kind in chip.kinds), None)
