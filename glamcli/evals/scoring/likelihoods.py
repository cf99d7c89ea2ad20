"""Log-likelihoods of continuations, in batches of few shapes.

What requests have in common (`units.py`) is computed once: the beginning that items share is read
into one key/value cache, the context that the options of an item share is read behind a copy of
it, and each option behind a copy of that.

Likelihoods are float32 sums of log-softmax over float32 logits. Experts never drop a token unless
the recipe asks for it (`moe.eval_dispatch`): under dropping a likelihood is not causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glamcli.evals.results.journal import Journal, digest
from glamcli.evals.scoring.batches import (
    COMPILE_BATCHES,
    MIN_ROW_TOKENS,
    Budget,
    Kind,
    Shape,
    plan,
    power_above,
    power_within,
    rounded,
    shape_for,
)
from glamcli.evals.scoring.packing import Batch, Likelihood, Trunk
from glamcli.evals.scoring.tokens import Scorable
from glamcli.evals.scoring.units import Unit, trunks, units_of
from glamcli.hosts.join import whole
from glamcli.model.kv_cache import Cache, extended, select_rows
from glamcli.parallel.mesh import with_mesh_of

AHEAD = 2
"""Batches under way while one is read, so that the device does not wait for Python."""


class Likelihoods:
    """Scores options with one model; every shape is compiled once."""

    def __init__(
        self,
        decoder: Any,
        params: Any,
        *,
        window: int,
        vocab_size: int,
        dispatch: str | None = "dropless",
        batch_tokens: int = 4096,
        share_prefixes: bool = True,
        min_saved: int | None = None,
        journal: Journal | None = None,
    ):
        self.window = window
        self.remembered: dict[Scorable, Likelihood] = {}
        """likelihoods that callers expect to need again"""
        self.num_tokens = 0
        """tokens read so far, padding included"""
        self._params = params
        self._budget = Budget(batch_tokens, vocab_size, _place_bytes(decoder))
        self._share = share_prefixes
        self._compile_tokens = COMPILE_BATCHES * batch_tokens
        self._min_saved = self._compile_tokens if min_saved is None else min_saved
        self._journal = journal or Journal()
        self._read: Any = jax.jit(partial(_read, decoder, dispatch), static_argnames="rows")
        self._score: Any = jax.jit(partial(_score, decoder, dispatch))
        self._compiled: dict[Kind, set[Shape]] = {}
        self._cached: tuple[Trunk, Cache] | None = None

    def renew(self, params: Any) -> None:
        """Goes on with other weights of the same model; its programs are kept."""
        self._params = params
        self.remembered.clear()

    @property
    def num_shapes(self) -> int:
        """Programs compiled so far."""
        return self._read._cache_size() + self._score._cache_size()

    def score(
        self,
        groups: Sequence[Sequence[Scorable]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[list[Likelihood]]:
        """Likelihoods of every request of every group (the options of one item).

        What the requests of a group have in common is computed once, and so is what groups have
        in common where that saves more than its programs cost to compile. `advance` is told how
        many requests got done.

        Raises:
            CheckpointError: a likelihood is not a number.
        """
        apart = groups if self._share else [[each] for group in groups for each in group]
        units = [unit for group in apart for unit in units_of(group)]
        found: dict[int, list[Likelihood]] = {}
        waiting: list[tuple[Batch, str, Any]] = []
        for batch in self._batches(units):
            key = digest(batch.given)
            answer = self._journal.get(key) or self._start(batch)
            waiting.append((batch, key, answer))
            if len(waiting) > AHEAD:
                found |= self._collect(*waiting.pop(0), advance)
        for each in waiting:
            found |= self._collect(*each, advance)
        self._cached = None
        flat = iter(each for index in range(len(units)) for each in found[index])
        return [[next(flat) for _ in group] for group in groups]

    def _batches(self, units: Sequence[Unit]) -> Iterator[Batch]:
        """All batches, in an order given by the units and by what was asked before: a second run
        makes the same ones, which is how it finds what the first one kept."""
        clusters = self._clusters(units)
        shared = {index for some in clusters.values() for _, each in some for index in each}
        yield from self._planned({i: unit for i, unit in enumerate(units) if i not in shared})
        for places, some in sorted(clusters.items()):
            num = min(power_above(len(some)), power_within(self._budget.places // places))
            for start in range(0, len(some), num):
                behind = {
                    index: units[index].behind(length)
                    for length, members in some[start : start + num]
                    for index in members
                }
                ids = tuple(dict.fromkeys(unit.trunk for unit in behind.values()))
                yield from self._planned(behind, Trunk(ids, num, places))

    def _clusters(self, units: Sequence[Unit]) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
        """Units behind a common trunk, with its length, by the places it takes in a cache."""
        clusters: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for length, members in trunks([unit.head for unit in units]) if self._share else ():
            clusters.setdefault(rounded(length, MIN_ROW_TOKENS), []).append((length, members))
        known = {kind.trunk for kind in self._compiled}
        return {
            places: some
            for places, some in clusters.items()
            if places in known
            or sum(length * (len(each) - 1) for length, each in some) >= self._min_saved
        }

    def _planned(self, units: Mapping[int, Unit], trunk: Trunk | None = None) -> Iterator[Batch]:
        kinds: dict[Kind, list[int]] = {}
        for index, unit in units.items():
            kind = Kind(trunk.places if trunk else 0, len(unit.parts), bool(unit.prefix))
            kinds.setdefault(kind, []).append(index)
        for kind, members in sorted(kinds.items()):
            shapes = [self._shape(kind, units[index]) for index in members]
            compiled = self._compiled.setdefault(kind, set())
            buckets = plan(shapes, kind, self._compile_tokens, compiled)
            compiled |= {bucket.shape for bucket in buckets}
            for bucket in buckets:
                rows = bucket.shape[0]
                for start in range(0, len(bucket.members), rows):
                    chosen = tuple(members[i] for i in bucket.members[start : start + rows])
                    some = tuple(units[index] for index in chosen)
                    yield Batch(chosen, some, kind, bucket.shape, trunk)

    def _shape(self, kind: Kind, unit: Unit) -> Shape:
        longest = max(len(part.ids) - 1 for part in unit.parts)
        if kind.nested:
            return shape_for(len(unit.prefix), longest, kind, self._budget)
        scored = max(part.num_scored for part in unit.parts)
        return shape_for(longest, scored, kind, self._budget)

    def _start(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        self.num_tokens += batch.shape[0] * batch.kind.tokens(batch.shape)
        trunk_B, *arrays = batch.arrays
        trunk = None if batch.trunk is None else (self._cache(batch.trunk), trunk_B)
        return with_mesh_of(self._params, self._score)(self._params, trunk, *arrays)

    def _cache(self, trunk: Trunk) -> Cache:
        """The cache that holds a trunk; it is read when the first batch needs it."""
        if self._cached is None or self._cached[0] is not trunk:
            self._cached = None
            self.num_tokens += trunk.num * trunk.places
            rows = min(trunk.num, power_within(self._budget.tokens // trunk.places))
            read = with_mesh_of(self._params, self._read)
            self._cached = trunk, read(self._params, *trunk.arrays, rows=rows)
        return self._cached[1]

    def _collect(
        self, batch: Batch, key: str, answer: Any, advance: Callable[[int], None]
    ) -> dict[int, list[Likelihood]]:
        """Likelihoods of every unit of a batch, from the journal or out of its arrays."""
        if isinstance(answer, dict):
            likelihoods = batch.told(answer)
        else:
            likelihoods = batch.likelihoods(*(whole(each) for each in answer))
            self._journal.add(key, batch.kept(likelihoods))
        advance(len(likelihoods))
        each = iter(likelihoods)
        units = zip(batch.indices, batch.units, strict=True)
        return {index: [next(each) for _ in unit.parts] for index, unit in units}


def _place_bytes(decoder: Any) -> int:
    """Bytes of one place of a cache: keys and values of all layers."""
    model = decoder.model
    width = model.num_heads * model.head_dim
    return 2 * model.num_layers * width * decoder.dtype.itemsize


def _read(
    decoder: Any,
    dispatch: Any,
    params: Any,
    tokens_GS: jax.Array,
    segments_GS: jax.Array,
    *,
    rows: int,
) -> Cache:
    """A cache that holds these tokens, read so many rows at a time."""

    def some(part: tuple[jax.Array, jax.Array]) -> Cache:
        cache = decoder.init_cache(*part[0].shape)
        return decoder.step(params, cache, *part, dispatch=dispatch)[1]

    G, S = tokens_GS.shape
    if rows == G:
        return some((tokens_GS, segments_GS))
    parts = tuple(x.reshape(G // rows, rows, S) for x in (tokens_GS, segments_GS))
    caches = jax.lax.map(some, parts)
    return {
        "layers": jax.tree.map(lambda x: _joined(jnp.swapaxes(x, 0, 1), 1), caches["layers"]),
        "segments": _joined(caches["segments"], 0),
        "length": _joined(caches["length"], 0),
    }


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Two axes that follow each other, as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _score(
    decoder: Any,
    dispatch: Any,
    params: Any,
    trunk: tuple[Cache, jax.Array] | None,
    prefix: Any,
    options: Any,
    judged: Any,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability [B, O, K] of each target, and whether it is the most likely token.

    `trunk` is a cache and the row of it [B] that each row goes on from; `prefix` are tokens and
    segments [B, S] that the options share, `options` the same [B, O, T], and `judged` positions
    and targets [B, O, K].
    """
    B, O, T = options[0].shape
    tokens_RT, segments_RT = (x.reshape(B * O, T) for x in options)
    if trunk is None and prefix is None:
        x_RTM, _ = decoder.hidden(params, tokens_RT, segments_RT, dispatch=dispatch)
    else:
        length = T if prefix is None else T + prefix[0].shape[1]
        cache = decoder.init_cache(B, length) if trunk is None else _room(*trunk, length)
        if prefix is not None:
            _, cache = decoder.step(params, cache, *prefix, dispatch=dispatch)
        cache = select_rows(cache, jnp.repeat(jnp.arange(B, dtype=jnp.int32), O))
        x_RTM, _ = decoder.step(params, cache, tokens_RT, segments_RT, dispatch=dispatch)
    positions_RK, targets_RK = (x.reshape(B * O, -1) for x in judged)
    x_RKM = jnp.take_along_axis(x_RTM, positions_RK[:, :, None], axis=1)
    logits_RKV = decoder.logits(params, x_RKM).astype(jnp.float32)
    logp_RKV = jax.nn.log_softmax(logits_RKV, axis=-1)
    logp_RK = jnp.take_along_axis(logp_RKV, targets_RK[:, :, None], axis=-1)[:, :, 0]
    greedy_RK = jnp.argmax(logits_RKV, axis=-1).astype(jnp.int32) == targets_RK
    return logp_RK.reshape(B, O, -1), greedy_RK.reshape(B, O, -1)


def _room(cache: Cache, rows_B: jax.Array, num: int) -> Cache:
    return extended(select_rows(cache, rows_B), num)
