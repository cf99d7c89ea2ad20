import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glamcli import libtpu


def pci(folder: Path, *vendors: str) -> str:
    for i, vendor in enumerate(vendors):
        device = folder / f"0000:00:{i:02x}.0"
        device.mkdir()
        (device / "vendor").write_text(vendor + "\n")
    return str(folder)


def test_a_tpu_is_a_device_of_googles(tmp_path):
    assert libtpu.has_tpu(pci(tmp_path, "0x8086", "0x1ae0"))


def test_other_devices_and_none_are_no_tpu(tmp_path):
    assert not libtpu.has_tpu(str(tmp_path))
    assert not libtpu.has_tpu(pci(tmp_path, "0x8086", "0x10de"))
    assert not libtpu.has_tpu("/no/such/folder")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(libtpu.has_tpu(), reason="there is a TPU")
def test_libtpu_says_nothing_where_there_is_no_tpu():
    # libtpu complains only where no other process holds its lock, so this may pass without cause,
    # and fails only with one.
    names = ("JAX_PLATFORMS", *libtpu.QUIET)
    environment = {k: v for k, v in os.environ.items() if k not in names}
    code = (
        "import os; from glamcli import libtpu; libtpu.quiet(); import jax; "
        "print(jax.default_backend(), flush=True); os.kill(os.getpid(), 15)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    # SIGTERM ends the process as it does any other, without libtpu's stacks.
    assert (done.stdout, done.stderr, done.returncode) == ("cpu\n", "", -15)
