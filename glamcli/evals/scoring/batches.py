"""Batches of requests: what they share, which run together, and as which arrays.

What requests share is computed once, on two levels: the options of an item share its context (the
group's `prefix`); and groups share what their contexts begin with (its `trunk`): demonstrations
that are the same for all items, or a passage that several questions are about. Nothing here runs
on a device.
"""

from __future__ import annotations

import base64
import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from glamcli.errors import CheckpointError
from glamcli.evals.scoring.requests import Ids, Likelihood, Request
from glamcli.evals.scoring.shapes import (
    COMPILE_BATCHES,
    MIN_ROW_TOKENS,
    Shape,
    plan_shapes,
    power_within,
    rounded,
)

_MIN_SHARED = 16
"""Common tokens from which on options are read behind one cached prefix."""
_MIN_TRUNK = 32
"""The same for different items."""
_MIN_TARGETS = 8
_LOGITS_BYTES = 256 * 1024**2
_CACHE_BYTES = 1024**3

_Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Group:
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

    def behind(self, num: int) -> _Group:
        """The group with the first `num` tokens of its head as its trunk."""
        trunk, rest = self.head[:num], self.head[num:]
        if self.prefix and len(rest) >= _MIN_SHARED:
            return replace(self, prefix=rest, trunk=trunk)
        drop = 0 if self.prefix else num
        kept = rest if self.prefix else ()
        requests = tuple(replace(each, ids=kept + each.ids[drop:]) for each in self.requests)
        return _Group(requests, (), trunk)


@dataclass(frozen=True, eq=False)
class Trunk:
    """Beginnings that several groups share, as rows of one cache."""

    ids: tuple[Ids, ...]
    rows: int
    """of the cache, empty ones included."""
    positions: int
    rows_at_once: int
    """as many are read by one program."""

    @cached_property
    def arrays(self) -> _Pair:
        """Tokens and segments [G, S]."""
        return _filled(self.ids, (self.rows, self.positions))

    @cached_property
    def row(self) -> dict[Ids, int]:
        return {ids: row for row, ids in enumerate(self.ids)}


@dataclass(frozen=True, eq=False)
class RequestBatch:
    """Groups that one program scores at once."""

    indices: tuple[int, ...]
    """which groups of the caller these are."""
    groups: tuple[_Group, ...]
    shape: Shape
    trunk: Trunk | None

    @cached_property
    def arrays(self) -> tuple[np.ndarray | None, _Pair | None, _Pair, _Pair]:
        """Row of the trunk [B]; prefixes [B, S]; options [B, O, T]; what is scored [B, O, Y].

        Pairs are tokens and segments, and for the last one positions within the option and the
        tokens wanted there.
        """
        shape = self.shape
        trunk_B = prefix = None
        if self.trunk is not None:
            trunk_B = np.zeros(shape.rows, np.int32)
            trunk_B[: len(self.groups)] = [self.trunk.row[each.trunk] for each in self.groups]
        if shape.nested:
            prefix = _filled([each.prefix for each in self.groups], (shape.rows, shape.length))
        size = shape.targets if shape.nested else shape.length
        tokens_BOT = np.zeros((shape.rows, shape.options, size), np.int32)
        segments_BOT = np.zeros_like(tokens_BOT)
        positions_BOY = np.zeros((shape.rows, shape.options, shape.targets), np.int32)
        wanted_BOY = np.zeros_like(positions_BOY)
        for at, request in self._requests():
            end, num = request.num_inputs, request.num_scored
            tokens_BOT[at][:end] = request.ids[:-1]
            segments_BOT[at][:end] = 1
            positions_BOY[at][:num] = np.arange(end - num, end)
            wanted_BOY[at][:num] = request.ids[-num:]
        return trunk_B, prefix, (tokens_BOT, segments_BOT), (positions_BOY, wanted_BOY)

    def likelihoods(self, logp_BOY: np.ndarray, greedy_BOY: np.ndarray) -> list[Likelihood]:
        """Of all requests, in order.

        Raises:
            CheckpointError: one is not a number.
        """
        found = []
        for at, request in self._requests():
            nats = logp_BOY[at][: request.num_scored]
            if not np.isfinite(nats).all():
                raise CheckpointError("the model's log-likelihoods are not finite numbers")
            is_greedy = bool(greedy_BOY[at][: request.num_scored].all())
            found.append(Likelihood(tuple(nats.tolist()), is_greedy))
        return found

    def to_json(self, found: Sequence[Likelihood]) -> dict[str, str]:
        """Likelihoods as JSON, to the last bit."""
        nats = np.concatenate([np.array(each.token_nats, np.float32) for each in found])
        return {
            "nats": base64.b64encode(nats.astype("<f4").tobytes()).decode(),
            "greedy": "".join(str(int(each.greedy)) for each in found),
        }

    def from_json(self, content: Mapping[str, Any]) -> list[Likelihood]:
        """Likelihoods from what `to_json` made of them."""
        nats = np.frombuffer(base64.b64decode(content["nats"]), "<f4")
        ends = np.cumsum([request.num_scored for _, request in self._requests()])
        parts = zip(np.split(nats, ends[:-1]), content["greedy"], strict=True)
        return [Likelihood(tuple(part.tolist()), greedy == "1") for part, greedy in parts]

    def _requests(self) -> list[tuple[tuple[int, int], Request]]:
        return [
            ((row, option), request)
            for row, group in enumerate(self.groups)
            for option, request in enumerate(group.requests)
        ]


def _filled(rows: Sequence[Ids], shape: tuple[int, int]) -> _Pair:
    """Tokens and segments, padded behind."""
    tokens_BS = np.zeros(shape, np.int32)
    segments_BS = np.zeros(shape, np.int32)
    for row, ids in enumerate(rows):
        tokens_BS[row, : len(ids)] = ids
        segments_BS[row, : len(ids)] = 1
    return tokens_BS, segments_BS


class BatchPlanner:
    """Batches of groups that share as much as is worth it, in few shapes."""

    def __init__(self, tokens: int, vocab_size: int, position_bytes: int, min_saved: int | None):
        """`tokens` are those of a batch, `position_bytes` keys and values of one position in all
        layers. Groups of several items share a trunk where that saves `min_saved` tokens (None: as
        many as its programs cost to compile)."""
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._positions = _CACHE_BYTES // max(1, position_bytes)
        self._compile_tokens = COMPILE_BATCHES * tokens
        self._min_saved = self._compile_tokens if min_saved is None else min_saved
        self._compiled: set[Shape] = set()

    def batches(self, items: Sequence[Sequence[Request]]) -> Iterator[RequestBatch]:
        """All batches, in an order given by the items and by what was planned before: a second run
        makes the same ones, which is how it finds what the first one kept."""
        groups = [group for item in items for group in _group_requests(item)]
        clusters = self._clusters(groups)
        shared = {index for some in clusters.values() for _, each in some for index in each}
        yield from self._planned({i: each for i, each in enumerate(groups) if i not in shared})
        for positions, some in sorted(clusters.items()):
            wanted = power_within(2 * len(some) - 1)  # not below their number
            rows = min(wanted, power_within(self._positions // positions))
            for start in range(0, len(some), rows):
                behind = {
                    index: groups[index].behind(length)
                    for length, members in some[start : start + rows]
                    for index in members
                }
                ids = tuple(dict.fromkeys(group.trunk for group in behind.values()))
                at_once = min(rows, power_within(self._tokens // positions))
                yield from self._planned(behind, Trunk(ids, rows, positions, at_once))

    def _clusters(self, groups: Sequence[_Group]) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
        """Groups behind a common trunk, with its length, by its positions in a cache."""
        clusters: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for length, members in _find_trunks([each.head for each in groups]):
            clusters.setdefault(rounded(length, MIN_ROW_TOKENS), []).append((length, members))
        known = {shape.trunk for shape in self._compiled}
        return {
            positions: some
            for positions, some in clusters.items()
            if positions in known
            or sum(length * (len(each) - 1) for length, each in some) >= self._min_saved
        }

    def _planned(
        self, groups: Mapping[int, _Group], trunk: Trunk | None = None
    ) -> Iterator[RequestBatch]:
        indices = list(groups)
        positions = trunk.positions if trunk else 0
        shapes = [self._shape(each, positions) for each in groups.values()]
        planned = plan_shapes(shapes, self._compile_tokens, self._compiled)
        self._compiled |= set(planned)
        for shape, members in planned.items():
            for start in range(0, len(members), shape.rows):
                chosen = tuple(indices[i] for i in members[start : start + shape.rows])
                yield RequestBatch(chosen, tuple(groups[index] for index in chosen), shape, trunk)

    def _shape(self, group: _Group, trunk: int) -> Shape:
        """The smallest shape for a group behind a trunk of `trunk` positions.

        Lengths and targets are of few sizes (`rounded`). Rows follow from what a batch, its float32
        logits and its caches may take; they are a power of two.
        """
        length = max(each.num_inputs for each in group.requests)
        targets = max(each.num_scored for each in group.requests)
        if group.prefix:
            length, targets = len(group.prefix), length
        return self._fitted(
            Shape(trunk, len(group.requests), bool(group.prefix), 1, length, targets)
        )

    def _fitted(self, shape: Shape) -> Shape:
        """The shape with rounded sizes and as many rows as the budget allows."""
        length, targets = (
            rounded(shape.length, MIN_ROW_TOKENS),
            rounded(shape.targets, _MIN_TARGETS),
        )
        shape = shape._replace(length=length, targets=targets)
        logits = 4 * shape.options * shape.targets * self._vocab_size
        rows = min(self._tokens // shape.row_tokens, _LOGITS_BYTES // logits)
        if positions := shape.row_positions:
            rows = min(rows, self._positions // positions)
        return shape._replace(rows=power_within(rows))


def _group_requests(requests: Sequence[Request]) -> list[_Group]:
    """One group when the beginning of the requests is worth sharing, else one for each."""
    if len(requests) > 1:
        heads = [each.ids[: len(each.ids) - each.num_scored] for each in requests]
        # The last common token is read again with every option, whose first logits it gives.
        shared = _num_common(min(heads), max(heads)) - 1
        if shared >= _MIN_SHARED:
            options = tuple(replace(each, ids=each.ids[shared:]) for each in requests)
            return [_Group(options, requests[0].ids[:shared])]
    return [_Group((each,)) for each in requests]


def _find_trunks(heads: Sequence[Ids]) -> list[tuple[int, tuple[int, ...]]]:
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
