"""Shapes of compiled programs: few of them, so that few are compiled.

Compiling a shape costs seconds, padding costs a fraction of a batch. So requests of rare sizes join
the next larger shape.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

MIN_ROW_TOKENS = 16
COMPILE_BATCHES = 8
"""Compiling a shape takes about as long as running this many batches."""


class Shape(NamedTuple):
    """What one compiled program differs in from others."""

    trunk: int = 0
    """positions of a cache that was filled before, by what several rows begin with; 0: none."""
    options: int = 1
    """requests in a row."""
    nested: bool = False
    """whether the options of a row are read behind `length` tokens that they share, in `targets`
    tokens each; else every request has `length` tokens, `targets` of them scored."""
    rows: int = 1
    length: int = 0
    targets: int = 0

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What a request cannot change by padding."""
        return self[:3]

    @property
    def row_tokens(self) -> int:
        """Tokens read per row."""
        if self.nested:
            return self.length + self.options * self.targets
        return self.options * self.length

    @property
    def row_positions(self) -> int:
        """Positions of the key/value cache per row, those of the trunk included."""
        if self.nested:
            return self.options * (self.trunk + self.length + self.targets)
        return self.options * (self.trunk + self.length) if self.trunk else 0


def plan_shapes(
    shapes: Sequence[Shape], compile_tokens: int, compiled: Collection[Shape] = ()
) -> dict[Shape, tuple[int, ...]]:
    """Few shapes for requests that are each given by the smallest shape they fit; shape: indices.

    Requests join the cheapest larger shape in use when the padding costs less than a compilation,
    which takes as long as reading `compile_tokens`.
    """
    members: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)
    for shape in sorted(members, key=lambda each: (each.kind, each.length, each.targets)):
        larger = [
            other
            for other in {*members, *compiled}
            if other != shape
            and other.kind == shape.kind
            and other.length >= shape.length
            and other.targets >= shape.targets
        ]
        if shape in compiled or not larger:
            continue
        best = min(larger, key=lambda other: (other.row_tokens, other))
        if len(members[shape]) * (best.row_tokens - shape.row_tokens) < compile_tokens:
            members[best] = members.get(best, []) + members.pop(shape)
    return {shape: tuple(sorted(members[shape])) for shape in sorted(members)}


def rounded(count: int, smallest: int) -> int:
    """The first of `smallest`, one and a half times that, and their doubles that is not below
    `count`: at most a third of it is padding."""
    size = smallest
    while size < count:
        size *= 2
    between = size // 4 * 3
    return between if size > smallest and count <= between else size


def power_within(count: int) -> int:
    """The largest power of two that is not above `count`, and 1 below that."""
    return 1 << (max(1, count).bit_length() - 1)
