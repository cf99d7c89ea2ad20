"""Huge pages for large arrays on Linux CPUs: a setting that must precede the process.

glibc gives every large buffer fresh 4 KiB pages; with huge pages a training step takes 11 to 12 %
less time (docs/decisions/0012). The C library reads the setting once, when a process starts, so
the program restarts itself with it, once, before jax is imported.
"""

import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
# Set by the restart, so that it happens once even where the C library drops the variable.
RESTARTED = "GLAM_HUGE_PAGES"
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def apply(wanted: bool) -> None:
    """Restarts this very command with huge pages, where that helps and was not done yet.

    Does not return when it restarts. Call it only from a command, before jax is imported.
    """
    if not wanted or unavailable() is not None or is_set() or RESTARTED in os.environ:
        return
    if "jax" in sys.modules or not _is_glam():
        return
    tunables = filter(None, (os.environ.get("GLIBC_TUNABLES"), f"{TUNABLE}=1"))
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(tunables), RESTARTED: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # The interpreter with its options and the script or module, exactly as it was started.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # slower, not wrong


def is_set() -> bool:
    """Whether the environment sets them already, on or off."""
    return TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


def unavailable() -> str | None:
    """Why huge pages cannot help here; None where they can."""
    if sys.platform != "linux":
        return "only on Linux"
    if platform.libc_ver()[0] != "glibc":
        return "needs the GNU C library"
    # Whether jax would use a GPU or TPU, without importing it.
    chosen = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if "cpu" not in chosen if chosen else any(Path(each).exists() for each in ACCELERATORS):
        return "arrays live on the accelerator"
    try:
        if "[never]" in TRANSPARENT.read_text():
            return f"disabled in the kernel ({TRANSPARENT})"
    except OSError:
        return "the kernel does not offer them"
    return None


def _is_glam() -> bool:
    """Whether this process was started as `glam`, not as a program that calls its commands."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    as_module = spec is not None and spec.name.split(".")[0] == "glamcli"
    return as_module or Path(sys.argv[0]).stem == "glam"
