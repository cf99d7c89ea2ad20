"""Which requests run together, and in which compiled shape. Pure arithmetic.

A program has a kind and a shape (rows, length, targets); compiling one costs seconds, padding
costs a fraction of a batch. So there are few shapes, and few requests join the next larger one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MIN_ROW_TOKENS = 16
MIN_TARGETS = 8
LOGITS_BYTES = 256 * 1024**2
CACHE_BYTES = 1024**3
COMPILE_BATCHES = 8
"""Compiling a shape takes about as long as running this many batches."""

Shape = tuple[int, int, int]
"""B rows, S tokens in a row, T targets."""


@dataclass(frozen=True, order=True)
class Kind:
    """What programs differ in besides their shape."""

    trunk: int = 0
    """places of a cache that was filled before, by what several rows begin with; 0: none."""
    options: int = 1
    """requests in a row."""
    nested: bool = False
    """whether the options of a row are read behind `length` tokens that they share, in `targets`
    tokens each; else every request has `length` tokens, `targets` of them judged."""

    def tokens(self, shape: Shape) -> int:
        """Tokens read per row."""
        _, length, targets = shape
        return length + self.options * targets if self.nested else self.options * length

    def places(self, shape: Shape) -> int:
        """Places of the key/value cache per row, those of the trunk included."""
        _, length, targets = shape
        if self.nested:
            return self.options * (self.trunk + length + targets)
        return self.options * (self.trunk + length) if self.trunk else 0


@dataclass(frozen=True)
class Budget:
    """What a batch may take."""

    tokens: int
    vocab_size: int
    place_bytes: int = 0
    """of one place of the cache: keys and values of all layers."""

    @property
    def places(self) -> int:
        """Places that a cache may have, over all of its rows."""
        return CACHE_BYTES // max(1, self.place_bytes)


@dataclass(frozen=True)
class Bucket:
    """Requests that are run in one compiled shape."""

    shape: Shape
    members: tuple[int, ...]


def plan(
    shapes: Sequence[Shape], kind: Kind, compile_tokens: int, compiled: Collection[Shape] = ()
) -> list[Bucket]:
    """Requests, each given by the smallest shape it fits, sorted into few shapes.

    Requests join the cheapest larger shape in use when the padding costs less than a compilation,
    which takes as long as reading `compile_tokens`.
    """
    groups: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    for shape in sorted(groups, key=lambda each: each[1:]):
        larger = [
            other
            for other in {*groups, *compiled}
            if other != shape and other[1] >= shape[1] and other[2] >= shape[2]
        ]
        if shape in compiled or not larger:
            continue
        best = min(larger, key=lambda other: (kind.tokens(other), other))
        padding = len(groups[shape]) * (kind.tokens(best) - kind.tokens(shape))
        if padding < compile_tokens:
            groups[best] = groups.get(best, []) + groups.pop(shape)
    return [Bucket(shape, tuple(sorted(groups[shape]))) for shape in sorted(groups)]


def shape_for(length: int, targets: int, kind: Kind, budget: Budget) -> Shape:
    """The smallest shape for a row of `length` tokens and `targets` tokens per option.

    Lengths and targets are of few sizes (`rounded`). Rows follow from what a batch, its float32
    logits and its caches may take; they are a power of two.
    """
    shape = (1, rounded(length, MIN_ROW_TOKENS), rounded(targets, MIN_TARGETS))
    logits = 4 * kind.options * shape[2] * budget.vocab_size
    rows = min(budget.tokens // kind.tokens(shape), LOGITS_BYTES // logits)
    if places := kind.places(shape):
        rows = min(rows, budget.places // places)
    return power_within(rows), *shape[1:]


def rounded(count: int, smallest: int) -> int:
    """The first of `smallest`, one and a half times that, and their doubles that is not below
    `count`: at most a third of it is padding."""
    size = smallest
    while size < count:
        size *= 2
    between = size // 4 * 3
    return between if size > smallest and count <= between else size


def power_above(count: int) -> int:
    """The first power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def power_within(count: int) -> int:
    """The largest power of two that is not above `count`, and 1 below that."""
    return 1 << (max(1, count).bit_length() - 1)
