"""Flags of XLA's compiler that are known to matter, by kind of chip, and whether a run sets them.

A recipe sets others, or these, under `runtime.xla_flags`. None that nobody has run on a device is
on by itself.
"""

from dataclasses import dataclass
from typing import Any

_MAXTEXT = "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py"
_TPUS = ("v4", "v5e", "v5p", "v6e", "7x")

WHOLE_PRODUCTS = ("xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000)
"""The flag, and MiB of an array from which XLA for TPUs cuts its product into a loop: larger than
any."""


@dataclass(frozen=True)
class XlaFlag:
    """A flag, the chips of `chips.toml` that it is for, and why one would set it to `value`."""

    name: str
    value: Any
    chips: tuple[str, ...]
    reason: str
    source: str
    state: str = "off: not run on a device by us"

    def __str__(self) -> str:
        return f"{self.state}. {str(self.value).lower()}: {self.reason} ({self.source})"


XLA_FLAGS = (
    XlaFlag(
        *WHOLE_PRODUCTS,
        ("v2", "v3", *_TPUS),
        "products are not cut into loops around their collectives",
        "docs/parallelism.md",
        "on where the recipe has `mesh.collective_matmul: off`",
    ),
    XlaFlag(
        "xla_enable_async_all_gather",
        True,
        _TPUS,
        "weights are gathered while something else is computed; takes memory",
        _MAXTEXT,
    ),
    XlaFlag(
        "xla_tpu_overlap_compute_collective_tc",
        True,
        _TPUS,
        "collectives run beside computations of the same core",
        _MAXTEXT,
    ),
    XlaFlag(
        "xla_tpu_enable_async_collective_fusion",
        True,
        ("v5e", "v5p", "v6e", "7x"),
        "collectives are fused with the computations they run beside; not for v4, where it was "
        "reported to compute wrongly",
        _MAXTEXT,
    ),
)


def flags_for(chip: str) -> dict[str, str]:
    """What is known of flags for a chip of `chips.toml`, by name."""
    return {flag.name: str(flag) for flag in XLA_FLAGS if chip in flag.chips}
