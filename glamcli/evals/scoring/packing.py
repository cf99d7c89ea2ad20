"""The arrays of one batch of likelihoods, and what is read out of its answer. Host side only."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from glamcli.errors import CheckpointError
from glamcli.evals.scoring.batches import Kind, Shape
from glamcli.evals.scoring.units import Ids, Part, Unit

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Likelihood:
    token_nats: tuple[float, ...]
    """log-probability of each scored token, in nats."""
    greedy: bool
    """whether greedy decoding would have produced exactly these tokens."""

    @property
    def total(self) -> float:
        return float(sum(self.token_nats))


@dataclass(frozen=True, eq=False)
class Trunk:
    """Beginnings that several units share, as rows of one cache."""

    ids: tuple[Ids, ...]
    num: int
    """rows, empty ones included."""
    places: int

    @cached_property
    def arrays(self) -> Pair:
        """Tokens and segments [G, S]."""
        return filled(self.ids, (self.num, self.places))

    @cached_property
    def row(self) -> dict[Ids, int]:
        return {ids: row for row, ids in enumerate(self.ids)}


@dataclass(frozen=True, eq=False)
class Batch:
    """Units that one program scores at once."""

    indices: tuple[int, ...]
    """which units of the caller these are."""
    units: tuple[Unit, ...]
    kind: Kind
    shape: Shape
    trunk: Trunk | None

    @cached_property
    def arrays(self) -> tuple[np.ndarray | None, Pair | None, Pair, Pair]:
        """Row of the trunk [B]; prefixes [B, S]; options [B, O, T]; what is judged [B, O, K].

        Pairs are tokens and segments, and for the last one positions within the option and the
        tokens wanted there.
        """
        rows, length, targets = self.shape
        trunk_B = prefix = None
        if self.trunk is not None:
            trunk_B = np.zeros(rows, np.int32)
            trunk_B[: len(self.units)] = [self.trunk.row[unit.trunk] for unit in self.units]
        if self.kind.nested:
            prefix = filled([unit.prefix for unit in self.units], (rows, length))
        size = targets if self.kind.nested else length
        shape = (rows, self.kind.options)
        tokens_BOT = np.zeros((*shape, size), np.int32)
        segments_BOT = np.zeros_like(tokens_BOT)
        positions_BOK = np.zeros((*shape, targets), np.int32)
        wanted_BOK = np.zeros_like(positions_BOK)
        for place, part in self._places():
            count = len(part.ids) - 1
            tokens_BOT[place][:count] = part.ids[:-1]
            segments_BOT[place][:count] = 1
            positions_BOK[place][: part.num_scored] = np.arange(count - part.num_scored, count)
            wanted_BOK[place][: part.num_scored] = part.ids[-part.num_scored :]
        return trunk_B, prefix, (tokens_BOT, segments_BOT), (positions_BOK, wanted_BOK)

    @property
    def given(self) -> list[np.ndarray]:
        """Everything that the answer depends on besides the model."""
        trunk_B, prefix, options, judged = self.arrays
        trunk = [] if self.trunk is None or trunk_B is None else [*self.trunk.arrays, trunk_B]
        return [*trunk, *(prefix or ()), *options, *judged]

    def likelihoods(self, logp_BOK: np.ndarray, greedy_BOK: np.ndarray) -> list[Likelihood]:
        """Of all requests, in order.

        Raises:
            CheckpointError: one is not a number.
        """
        found = []
        for place, part in self._places():
            nats = logp_BOK[place][: part.num_scored]
            if not np.isfinite(nats).all():
                raise CheckpointError("the model's log-likelihoods are not finite numbers")
            is_greedy = bool(greedy_BOK[place][: part.num_scored].all())
            found.append(Likelihood(tuple(nats.tolist()), is_greedy))
        return found

    def kept(self, found: Sequence[Likelihood]) -> dict[str, str]:
        """Likelihoods as JSON, to the last bit."""
        nats = np.concatenate([np.array(each.token_nats, np.float32) for each in found])
        return {
            "nats": base64.b64encode(nats.astype("<f4").tobytes()).decode(),
            "greedy": "".join(str(int(each.greedy)) for each in found),
        }

    def told(self, kept: Mapping[str, Any]) -> list[Likelihood]:
        """Likelihoods from what `kept` made of them."""
        nats = np.frombuffer(base64.b64decode(kept["nats"]), "<f4").tolist()
        found, start = [], 0
        for (_, part), greedy in zip(self._places(), kept["greedy"], strict=True):
            end = start + part.num_scored
            found.append(Likelihood(tuple(nats[start:end]), greedy == "1"))
            start = end
        return found

    def _places(self) -> list[tuple[tuple[int, int], Part]]:
        return [
            ((row, option), part)
            for row, unit in enumerate(self.units)
            for option, part in enumerate(unit.parts)
        ]


def filled(rows: Sequence[Ids], shape: tuple[int, int]) -> Pair:
    """Tokens and segments, padded behind."""
    tokens_BS = np.zeros(shape, np.int32)
    segments_BS = np.zeros(shape, np.int32)
    for row, ids in enumerate(rows):
        tokens_BS[row, : len(ids)] = ids
        segments_BS[row, : len(ids)] = 1
    return tokens_BS, segments_BS
