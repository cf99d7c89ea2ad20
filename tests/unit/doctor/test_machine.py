"""What a machine offers, in words."""

from glamcli import hugepages
from glamcli.doctor import machine


def test_huge_pages_are_shown_with_what_they_give_or_why_they_are_off(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(hugepages, "unavailable", lambda: "only on Linux")
    assert machine.huge_pages() == "off: only on Linux"
    monkeypatch.setattr(hugepages, "unavailable", lambda: None)
    assert "11 to 12 % less time" in machine.huge_pages()
    monkeypatch.setenv("GLIBC_TUNABLES", f"{hugepages.TUNABLE}=0")
    assert machine.huge_pages() == f"as set in GLIBC_TUNABLES ({hugepages.TUNABLE}=0)"
