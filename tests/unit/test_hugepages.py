"""Huge pages are asked for once, by a restart of the same command line."""

import subprocess
import sys

import pytest

from glamcli import hugepages

PROGRAM = """
import os, sys
from glamcli import hugepages
hugepages.unavailable = lambda: None
hugepages.apply(True)
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], os.environ.get("{marker}"))
"""


def run(tmp_path, name: str, **environment: str) -> list[str]:
    script = tmp_path / name
    script.write_text(PROGRAM.format(marker=hugepages.RESTARTED))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(script), "train", "a b"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path), **environment},
    )
    out, _ = process.communicate(timeout=20)
    pid, *rest = out.split(maxsplit=1)
    assert int(pid) == process.pid, "a restart keeps the process"
    return rest


def test_restarts_once_with_the_same_arguments(tmp_path):
    assert run(tmp_path, "glam") == [f"{hugepages.TUNABLE}=1 ['train', 'a b'] 1\n"]


def test_adds_to_tunables_that_are_there_and_respects_a_choice(tmp_path):
    (line,) = run(tmp_path, "glam", GLIBC_TUNABLES="glibc.malloc.check=0")
    assert line.startswith(f"glibc.malloc.check=0:{hugepages.TUNABLE}=1 ")
    (line,) = run(tmp_path, "glam", GLIBC_TUNABLES=f"{hugepages.TUNABLE}=0")
    assert line == f"{hugepages.TUNABLE}=0 ['train', 'a b'] None\n"


def test_never_restarts_twice(tmp_path):
    (line,) = run(tmp_path, "glam", **{hugepages.RESTARTED: "1"})
    assert line == "None ['train', 'a b'] 1\n"


def test_never_restarts_a_program_that_calls_a_command(tmp_path):
    assert run(tmp_path, "other.py") == ["None ['train', 'a b'] None\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux")
def test_a_kernel_told_not_to_makes_it_unavailable(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    enabled = tmp_path / "enabled"
    monkeypatch.setattr(hugepages, "TRANSPARENT", enabled)
    enabled.write_text("always madvise [never]\n")
    assert "disabled in the kernel" in str(hugepages.unavailable())
    enabled.write_text("always [madvise] never\n")
    assert hugepages.unavailable() is None
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert hugepages.unavailable() == "arrays live on the accelerator"
