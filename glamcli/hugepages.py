"""Huge pages for large arrays on Linux CPUs: a setting that must precede the process.

glibc gives every large buffer fresh 4 KiB pages; asked for huge pages, memory traffic on the CPU
is several times faster (see benchmarks). The C library reads the request once, when a process
starts, so the program restarts itself with it, once, before jax is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
# Set by the restart, so that it happens once even where the C library drops the variable.
RESTARTED = "GLAM_HUGE_PAGES"
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def apply(wanted: bool) -> None:
    """Restarts this very command with huge pages, where that helps and was not done yet.

    Does not return when it restarts. Call it only from a command, before jax is imported.
    """
    if not wanted or unavailable() is not None or TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if RESTARTED in os.environ or "jax" in sys.modules or not _is_glam():
        return
    tunables = [os.environ.get("GLIBC_TUNABLES"), f"{TUNABLE}=1"]
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": ":".join(filter(None, tunables)),
        RESTARTED: "1",
    }
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # The interpreter with its options and the script or module, exactly as it was started.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # slower, not wrong


def unavailable() -> str | None:
    """Why huge pages cannot help here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "only on Linux"
    if "glibc" not in _libc():
        return "needs the GNU C library"
    if _accelerator():
        return "arrays live on the accelerator"
    try:
        if "[never]" in TRANSPARENT.read_text():
            return f"the kernel is told not to ({TRANSPARENT})"
    except OSError:
        return "the kernel does not offer them"
    return None


def status() -> str:
    """One line for `glam doctor`."""
    if TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return "on (asked for in GLIBC_TUNABLES)"
    reason = unavailable()
    return "on for training, by one restart" if reason is None else f"off: {reason}"


def _is_glam() -> bool:
    """Whether this process was started as `glam`, not as a program that calls its commands."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    as_module = spec is not None and spec.name.split(".")[0] == "glamcli"
    return as_module or Path(sys.argv[0]).stem == "glam"


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return ""


def _accelerator() -> bool:
    """Whether jax would use a GPU or TPU, told without importing it."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen:
        return "cpu" not in chosen.split(",")[0]
    return any(
        Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
    )
