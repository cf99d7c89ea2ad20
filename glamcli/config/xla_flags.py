"""Flags of XLA's compiler that are known to matter, by kind of chip, and whether a run sets them.

A recipe sets others, or these, under `runtime.xla_flags`. None that nobody has run on a device is
on by itself; `glam plan --tune` tries those that are off.
"""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

_MAXTEXT = "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py"
_AXLEARN = "github.com/apple/axlearn, axlearn/common/compiler_options.py"
_TPUS = ("v4", "v5e", "v5p", "v6e", "7x")
_NOT_RUN = "off: not run on a device by us"

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
    state: str = _NOT_RUN
    collective: str | None = None
    """the kind of collective without which it changes nothing."""

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
        f"{_MAXTEXT}; for v4 {_AXLEARN}",
        collective="all-gather",
    ),
    XlaFlag(
        "xla_tpu_enable_async_all_to_all",
        True,
        _TPUS,
        "tokens go to their experts while something else is computed",
        _MAXTEXT,
        collective="all-to-all",
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
        ("v5e",),
        "collectives are fused with computations beside which they run; the compiler says that "
        "other chips may then compute wrongly or hang",
        f"{_MAXTEXT}; libtpu 0.0.52",
    ),
    XlaFlag(
        "xla_jf_crs_combiner_threshold_count",
        10,
        _TPUS,
        "ten all-reduces are combined at most, so that the first begin earlier",
        _AXLEARN,
        collective="all-reduce",
    ),
    XlaFlag(
        "xla_tpu_scheduler_percent_shared_memory_limit",
        100,
        _TPUS,
        "the scheduler may fill all memory, not 95 % of it, with what is in flight",
        f"{_MAXTEXT}; what it means: {_AXLEARN}",
    ),
    XlaFlag(
        "xla_tpu_scoped_vmem_limit_kib",
        98304,
        ("v6e",),
        "one operation may use three quarters of the fast memory",
        _AXLEARN,
    ),
)


def flags_for(chip: str) -> dict[str, str]:
    """What is known of flags for a chip of `chips.toml`, by name."""
    return {flag.name: str(flag) for flag in XLA_FLAGS if chip in flag.chips}


def tunable_flags(chip: str) -> list[XlaFlag]:
    """Flags that are off by themselves and not known to be wrong on a chip of `chips.toml`."""
    return [flag for flag in XLA_FLAGS if chip in flag.chips and flag.state == _NOT_RUN]


def fast_compilation() -> str:
    """Flags for programs that run once on a CPU, where compiling is all that takes time."""
    flags = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The emitters of fusions that replaced these, and alone are left in later versions, take
        # about twice the time to compile a step.
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags
