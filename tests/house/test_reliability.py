"""The page about reliability names tests that exist, for every fault, and every kind of fault."""

import re
from pathlib import Path

from glamcli import faults

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| ([^|]+) \| (.+) \|$", PAGE, re.M)


def test_every_fault_has_a_test_that_exists_or_a_reason():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 93))
    previous = ""
    for number, _, proof in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", proof)
        for file, name in named:
            found = re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)
            assert found, f"row {number}: tests/{file} has no {name}"
        same = proof.startswith("the same") and "::" in previous
        assert named or same or len(proof.split()) > 7, f"row {number} has neither test nor reason"
        previous = proof if named else previous


def test_every_kind_of_fault_is_explained_as_the_program_explains_it():
    section = PAGE.partition("## Rehearse")[2].partition("## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.M)
    assert dict(listed) == faults.FAULT_KINDS
