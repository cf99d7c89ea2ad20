"""What a machine offers, in words."""

from glamcli import hugepages
from glamcli.config.chips import load_chips
from glamcli.config.xla_flags import XLA_FLAGS
from glamcli.doctor import machine


def test_huge_pages_are_shown_with_what_they_give_or_why_they_are_off(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(hugepages, "unavailable", lambda: "only on Linux")
    assert machine.huge_pages() == "off: only on Linux"
    monkeypatch.setattr(hugepages, "unavailable", lambda: None)
    assert "11 to 12 % less time" in machine.huge_pages()
    monkeypatch.setenv("GLIBC_TUNABLES", f"{hugepages.TUNABLE}=0")
    assert machine.huge_pages() == f"as set in GLIBC_TUNABLES ({hugepages.TUNABLE}=0)"


def test_flags_of_xla_are_shown_for_the_devices_they_are_for():
    fused = "xla_tpu_enable_async_collective_fusion"
    assert fused in machine.xla_flags("TPU v5 lite")
    assert fused not in machine.xla_flags("TPU v4")
    assert "off: not run" in machine.xla_flags("TPU v4")["xla_enable_async_all_gather"]
    assert machine.xla_flags("cpu").keys() == {"XLA flags"}


def test_flags_of_xla_are_for_chips_that_there_are():
    assert {chip for flag in XLA_FLAGS for chip in flag.chips} <= load_chips().keys()
