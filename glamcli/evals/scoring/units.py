"""What requests have in common, and is therefore computed once. Pure arithmetic on token ids.

Two levels: the options of an item share its context (`prefix`); and items share what their
contexts begin with (`trunk`): demonstrations that are the same for all items, or a passage that
several questions are about. What is shared is read once into a key/value cache, behind copies of
which the rest is read.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from glamcli.evals.scoring.tokens import Scorable

Ids = tuple[int, ...]

MIN_SHARED = 16
"""Common tokens from which on options are read behind one cached prefix."""
MIN_TRUNK = 32
"""The same for different items."""


@dataclass(frozen=True)
class Part:
    """Tokens of one request that are not shared; the first one is no target."""

    ids: Ids
    num_scored: int


@dataclass(frozen=True)
class Unit:
    """Requests computed together: the options of an item, or one request by itself."""

    parts: tuple[Part, ...]
    prefix: Ids = ()
    """what the parts share among themselves only."""
    trunk: Ids = ()
    """what they share with other units as well; before the prefix."""

    @property
    def head(self) -> Ids:
        """What could be shared with other units: everything before the first token that is judged
        or in which the parts differ."""
        return self.prefix or self.parts[0].ids[: -self.parts[0].num_scored - 1]

    def behind(self, num: int) -> Unit:
        """The unit with the first `num` tokens of its head as its trunk."""
        trunk, rest = self.head[:num], self.head[num:]
        if self.prefix and len(rest) >= MIN_SHARED:
            return replace(self, prefix=rest, trunk=trunk)
        if self.prefix:
            parts = tuple(replace(part, ids=rest + part.ids) for part in self.parts)
        else:
            (part,) = self.parts
            parts = (replace(part, ids=part.ids[num:]),)
        return Unit(parts, (), trunk)


def units_of(group: Sequence[Scorable]) -> list[Unit]:
    """One unit for the whole group when its beginning is worth sharing, else one each."""
    if len(group) > 1:
        heads = [each.ids[: len(each.ids) - each.num_scored] for each in group]
        # The last common token is read again with every option, whose first logits it gives.
        shared = common(min(heads), max(heads)) - 1
        if shared >= MIN_SHARED:
            parts = tuple(Part(each.ids[shared:], each.num_scored) for each in group)
            return [Unit(parts, group[0].ids[:shared])]
    return [Unit((Part(each.ids, each.num_scored),)) for each in group]


def trunks(heads: Sequence[Ids]) -> list[tuple[int, tuple[int, ...]]]:
    """Heads that begin alike: the number of their common tokens and their indices.

    In dictionary order neighbours have most in common; a head joins its neighbours when that
    saves no less than leaving it out.
    """
    found = []
    members: list[int] = []
    length = 0
    for index in sorted(range(len(heads)), key=lambda index: heads[index]):
        joint = min(length, common(heads[members[-1]], heads[index])) if members else 0
        if joint < MIN_TRUNK or len(members) * joint < (len(members) - 1) * length:
            found.append((length, tuple(members)))
            members, joint = [], len(heads[index])
        members.append(index)
        length = joint
    found.append((length, tuple(members)))
    return [(length, members) for length, members in found if len(members) > 1]


def common(first: Ids, second: Ids) -> int:
    """Length of the longest common beginning."""
    longest = min(len(first), len(second))
    differs = lambda count: first[:count] != second[:count]  # noqa: E731
    return bisect.bisect_left(range(1, longest + 1), True, key=differs)
