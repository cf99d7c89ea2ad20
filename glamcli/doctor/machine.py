"""What this machine offers to a run: devices, cores, memory, huge pages, folders, versions.

Called by `glam doctor`.
"""

import importlib.metadata
import os
import platform
import shutil
from collections import Counter
from pathlib import Path

import jax

import glamcli
from glamcli import hugepages
from glamcli.config.chips import chip_of
from glamcli.config.xla_flags import flags_for
from glamcli.data.cache import user_cache_dir
from glamcli.data.workers import num_cores

SHOWN_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "array_record",
    "grain",
    "sentencepiece",
)


def machine_facts() -> dict[str, str]:
    """Everything by name, for a table or for JSON."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return {
        "glam": glamcli.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "devices": ", ".join(f"{number} x {kind}" for kind, number in kinds.items()),
        "cores": str(num_cores()),
        "memory": _memory(),
        "huge pages": huge_pages(),
        "cache folder": _folder(user_cache_dir()),
        "run folders": _folder(Path.cwd() / "runs"),
        **xla_flags(jax.devices()[0].device_kind),
        **{name: _version(name) for name in SHOWN_LIBRARIES},
    }


def xla_flags(device_kind: str) -> dict[str, str]:
    """What is known of flags of XLA for such devices, by name."""
    known = flags_for(chip.name) if (chip := chip_of(device_kind)) else {}
    return known or {"XLA flags": "none are known for these devices (runtime.xla_flags sets any)"}


def huge_pages() -> str:
    """Whether runs here use huge pages, and what they gain by it."""
    if hugepages.is_set():
        return f"as set in GLIBC_TUNABLES ({os.environ['GLIBC_TUNABLES']})"
    if (reason := hugepages.unavailable()) is not None:
        return f"off: {reason}"
    return "on for runs, by one restart; a step takes 11 to 12 % less time (runtime.huge_pages)"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _folder(path: Path) -> str:
    """Where it is, what is free there, and whether this user may write to it."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    writable = os.access(existing, os.W_OK)
    free = shutil.disk_usage(existing).free / 2**30
    return f"{path} ({free:.0f} GiB free{'' if writable else ', NOT WRITABLE'})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
