"""Requests to a model (BOS, context, continuation), from texts, and what groups of them share.

Trailing blanks of the context move to the continuation (they would otherwise be a token the model
never saw before a word); context and continuation are encoded together, and the scored tokens are
those after the encoding of the context alone. Where a piece spans the border (the context's
encoding is not a prefix of the joint one), scoring starts at the first token in which the two
differ, so that no character of the continuation is left unscored. BOS is always first.

What requests share is computed once, on two levels: the options of an item share its context (the
group's `prefix`); and groups share what their contexts begin with (its `trunk`): demonstrations
that are the same for all items, or a passage that several questions are about.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from glamcli.data.tokenizer import Tokenizer

Ids = tuple[int, ...]

_MIN_SHARED = 16
"""Common tokens from which on options are read behind one cached prefix."""
_MIN_TRUNK = 32
"""The same for different items."""


@dataclass(frozen=True)
class Request:
    """Tokens, and how many of them at the end are scored; the first one is never scored."""

    ids: Ids
    num_scored: int
    num_cut: int = 0
    """context tokens that did not fit into the window; the earliest are cut."""

    @property
    def num_inputs(self) -> int:
        return len(self.ids) - 1


def make_requests(
    encoder: Tokenizer, pairs: Sequence[tuple[str, str]], window: int
) -> list[Request] | None:
    """Requests for the (context, continuation) pairs of one item, all cut alike.

    `window` counts input tokens, BOS included. The context keeps its end, as much of it as fits
    before the longest continuation of the item. None when a continuation exceeds the window.
    """
    parts = [_split(encoder, *pair) for pair in pairs]
    longest = max(len(scored) for _, scored in parts)
    room = window - longest  # BOS and all but the last scored token are inputs too
    if room < 0:
        return None
    made = []
    for context, scored in parts:
        cut = max(0, len(context) - room)
        made.append(Request((encoder.bos_id, *context[cut:], *scored), len(scored), cut))
    return made


def _split(encoder: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Context ids (without BOS) and the ids to score, by the rule at the top of this file."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        continuation = context[-blanks:] + continuation
        context = context[:-blanks]
    joint = encoder.encode(context + continuation)
    alone = encoder.encode(context) if context else []
    split = 0
    while split < min(len(alone), len(joint) - 1) and alone[split] == joint[split]:
        split += 1
    return joint[:split], joint[split:]


@dataclass(frozen=True)
class Group:
    """Requests computed together: the options of an item, or one request by itself."""

    requests: tuple[Request, ...]
    """without the tokens that they share."""
    prefix: Ids = ()
    """what the requests share among themselves only."""
    trunk: Ids = ()
    """what they share with other groups as well; before the prefix."""

    @property
    def head(self) -> Ids:
        """What could be shared with other groups: everything before the first token that is scored
        or in which the requests differ."""
        return self.prefix or self.requests[0].ids[: -self.requests[0].num_scored - 1]

    def behind(self, num: int) -> Group:
        """The group with the first `num` tokens of its head as its trunk."""
        trunk, rest = self.head[:num], self.head[num:]
        if self.prefix and len(rest) >= _MIN_SHARED:
            return replace(self, prefix=rest, trunk=trunk)
        drop = 0 if self.prefix else num
        kept = rest if self.prefix else ()
        requests = tuple(replace(each, ids=kept + each.ids[drop:]) for each in self.requests)
        return Group(requests, (), trunk)


def group_requests(requests: Sequence[Request]) -> list[Group]:
    """One group when the beginning of the requests is worth sharing, else one for each."""
    if len(requests) > 1:
        heads = [each.ids[: len(each.ids) - each.num_scored] for each in requests]
        # The last common token is read again with every option, whose first logits it gives.
        shared = _num_common(min(heads), max(heads)) - 1
        if shared >= _MIN_SHARED:
            options = tuple(replace(each, ids=each.ids[shared:]) for each in requests)
            return [Group(options, requests[0].ids[:shared])]
    return [Group((each,)) for each in requests]


def find_trunks(heads: Sequence[Ids]) -> list[tuple[int, tuple[int, ...]]]:
    """Heads that begin alike: the number of their common tokens and their indices.

    In dictionary order neighbours have most in common; a head joins its neighbours when that
    saves no less than leaving it out.
    """
    found = []
    members: list[int] = []
    length = 0
    for index in sorted(range(len(heads)), key=lambda index: heads[index]):
        joint = min(length, _num_common(heads[members[-1]], heads[index])) if members else 0
        if joint < _MIN_TRUNK or len(members) * joint < (len(members) - 1) * length:
            found.append((length, tuple(members)))
            members, joint = [], len(heads[index])
        members.append(index)
        length = joint
    found.append((length, tuple(members)))
    return [(length, members) for length, members in found if len(members) > 1]


def _num_common(first: Ids, second: Ids) -> int:
    """Length of the longest common beginning."""
    longest = min(len(first), len(second))
    differs = lambda count: first[:count] != second[:count]  # noqa: E731
    return bisect.bisect_left(range(1, longest + 1), True, key=differs)
