"""Prints the two set-up lines of the README: the one that trains, then the one that tests."""

import re
import sys
from pathlib import Path

ENDINGS = ("glam train quickstart", "pytest")


def main() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", Path("README.md").read_text(), re.M | re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    setup = [line for line in lines if line.startswith("python3 -m venv ")]
    found = [[line for line in setup if line.endswith(ending)] for ending in ENDINGS]
    if len(setup) != 2 or [len(group) for group in found] != [1, 1]:
        sys.exit(f"README.md must hold one set-up line for each of {ENDINGS}, it has: {setup}")
    for (line,) in found:
        sys.stdout.write(line + "\n")


main()
