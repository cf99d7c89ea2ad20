"""Optimized HLO as text, taken apart: computations, instructions, loops, array types.

Text, because that is all that compilers for CPU, GPU and described TPUs have in common. Its
collectives are read in `collectives.py`, its time in `schedule.py`.
"""

import re
from dataclasses import dataclass
from functools import cached_property

DTYPE_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}

_HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """`name = result opcode(operands), attributes`; `rest` is all that follows the opcode."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the arguments."""
        return re.findall(r"%([\w.-]+)", first_type("(" + self.rest)[0])

    @property
    def op_name(self) -> str:
        """The path of `jax.named_scope`s that it belongs to, as far as XLA kept it."""
        return self.find(r'op_name="([^"]*)"') or ""

    @property
    def channel(self) -> str | None:
        return self.find(r"channel_id=(\d+)")

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in `rest`."""
        match = re.search(pattern, self.rest)
        return match[1] if match else None

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that these attributes refer to."""
        found = []
        for attribute in attributes:
            # Only `branch_computations` has several; after others a comma ends it.
            several = r"(?:, ?%?[\w.-]+)*" if attribute == "branch_computations" else ""
            names = self.find(rf"\b{attribute}=\{{?(%?[\w.-]+{several})")
            found += re.findall(r"[\w.-]+", names or "")
        return found

    @property
    def inlined(self) -> list[str]:
        """Computations that are part of this instruction."""
        return self.called("calls") if self.opcode in ("fusion", "async-start") else []

    @property
    def branches(self) -> list[str]:
        """Computations that a `call` runs, or of which a `conditional` runs one."""
        if self.opcode == "call":
            return self.called("to_apply", "calls")
        names = ("branch_computations", "true_computation", "false_computation")
        return self.called(*names) if self.opcode == "conditional" else []


class Module:
    """The text of an optimized module, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                current = self.computations[head["name"]] = []
                self.entry = head["name"] if head["entry"] else self.entry
            elif (equals := line.find(" = ")) > 0 and line.startswith(" "):
                name = line[:equals].strip().removeprefix("ROOT ").lstrip("%")
                result, after = first_type(line[equals + 3 :])
                opcode, _, rest = after.partition("(")
                current.append(Instruction(name, result, opcode.strip(), rest))
        if not self.entry:
            raise ValueError("not the text of an HLO module")

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often a run executes each computation; those inlined into a caller are left out.
        A loop of unknown length counts as one round."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for line in self.computations[name]:
                if line.opcode == "while":
                    for callee in line.called("body", "condition"):
                        visit(callee, times * self.trips(line))
                for callee in line.branches:
                    visit(callee, times)

        visit(self.entry, 1)
        return counts

    def trips(self, loop: Instruction) -> int:
        """Rounds of a loop: as XLA noted them, or, on TPU, what the counter is compared with."""
        if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = [line for name in loop.called("condition") for line in self.computations[name]]
        limits = [
            re.match(r"\d+", line.rest)
            for line in condition
            if line.opcode == "constant" and re.match(r"[su]\d+\[\]", line.result)
        ]
        counts = [line for line in condition if line.opcode == "compare" and "=LT" in line.rest]
        return int(limits[0][0]) if counts and len(limits) == 1 and limits[0] else 1


def first_type(text: str) -> tuple[str, str]:
    """The type at the start of `text`, which is a tuple or ends at a blank, and what follows."""
    if not text.startswith("("):
        kind, _, after = text.partition(" ")
        return kind, after
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :].lstrip()
    raise ValueError(f"not the text of an HLO module: {text[:80]}")


def arrays(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bits per element and shape of every array in a type."""
    found = []
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = DTYPE_BITS.get(dtype) or (int(digits[1]) if digits else 0)
        found.append((bits, tuple(int(dim) for dim in dims.split(",") if dim)))
    return found
