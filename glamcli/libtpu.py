"""Keeps libtpu off the screen where there is no TPU.

Extra `[plan]` installs libtpu for its compiler. jax then starts it in every process, also where no
TPU is, and it prints four lines of its own about a pod, and stacks on SIGTERM.
"""

import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PCI_DEVICES = "/sys/bus/pci/devices"
GOOGLE = "0x1ae0"

QUIET = {
    # No question to a metadata server, no complaint that this is no TPU machine, and several
    # processes may compile at once.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

NO_STACKS = "--install_signal_handlers=false"
"""libtpu's own handlers print a stack before SIGTERM ends the process."""


def quiet() -> None:
    """What must be set before jax loads libtpu; leaves what the user has set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "install_signal_handlers" not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {NO_STACKS}".strip()


def has_tpu(devices: str = PCI_DEVICES) -> bool:
    """Whether a device of Google's is on the PCI bus, which is what jax itself looks for."""
    return any(_read(vendor) == GOOGLE for vendor in Path(devices).glob("*/vendor"))


def unfit() -> str | None:
    """Why the libtpu here is not the one that jax was built with; None where it is, or there is
    none. Its profiler then ends the process: jax 0.10.2 and libtpu 0.0.52 do not have one form."""
    try:
        installed, wanted = version("libtpu"), " ".join(requires("jax") or ())
    except PackageNotFoundError:
        return None
    pinned = re.search(r"libtpu==([\d.]+?)(\.\*)?;", wanted)
    if pinned is None or f"{installed}.".startswith(f"{pinned[1]}."):
        return None
    return f"libtpu {installed} is installed, jax {version('jax')} was built with {pinned[1]}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
