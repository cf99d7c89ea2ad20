"""Batches of requests: which run together, in which compiled shape, and as which arrays.

Compiling a shape costs seconds, padding costs a fraction of a batch. So there are few shapes, and
few requests join the next larger one. Nothing here runs on a device.
"""

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from glamcli.errors import CheckpointError
from glamcli.evals.scoring.requests import Group, Ids, Request

MIN_ROW_TOKENS = 16
_MIN_TARGETS = 8
_LOGITS_BYTES = 256 * 1024**2
_CACHE_BYTES = 1024**3
COMPILE_BATCHES = 8
"""Compiling a shape takes about as long as running this many batches."""

_Pair = tuple[np.ndarray, np.ndarray]


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


@dataclass(frozen=True)
class Budget:
    """What a batch may take."""

    tokens: int
    vocab_size: int
    position_bytes: int = 0
    """of one position of the cache: keys and values of all layers."""

    @property
    def positions(self) -> int:
        """Positions that a cache may have, over all of its rows."""
        return _CACHE_BYTES // max(1, self.position_bytes)

    def shape(self, group: Group, trunk: int) -> Shape:
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
        rows = min(
            self.tokens // shape.row_tokens,
            _LOGITS_BYTES // (4 * shape.options * shape.targets * self.vocab_size),
        )
        if positions := shape.row_positions:
            rows = min(rows, self.positions // positions)
        return shape._replace(rows=power_within(rows))


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


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of one request."""

    token_nats: tuple[float, ...]
    """log-probability of each scored token, in nats."""
    greedy: bool
    """whether greedy decoding would have produced exactly these tokens."""

    @property
    def total(self) -> float:
        return float(sum(self.token_nats))


@dataclass(frozen=True, eq=False)
class Trunk:
    """Beginnings that several groups share, as rows of one cache."""

    ids: tuple[Ids, ...]
    rows: int
    """of the cache, empty ones included."""
    positions: int

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
    groups: tuple[Group, ...]
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
