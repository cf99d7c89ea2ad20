"""Log-likelihoods of continuations, in batches of few shapes.

What requests have in common (`batches.py`) is computed once: the beginning that items share is
read into one key/value cache, the context that the options of an item share behind a copy of it,
and each option behind a copy of that.

Likelihoods are float32 sums of log-softmax over float32 logits. Experts never drop a token unless
the recipe asks for it (`moe.eval_dispatch`): under dropping a likelihood is not causal.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from glamcli.evals.results.journal import Journal, inputs_digest
from glamcli.evals.scoring.batches import BatchPlanner, RequestBatch, Trunk
from glamcli.evals.scoring.requests import Likelihood, Request
from glamcli.model.kv_cache import Cache, extended, select_rows
from glamcli.parallel.mesh import whole, with_mesh_of
from glamcli.trained import Trained

_BATCH_TOKENS, _CPU_BATCH_TOKENS = 32_768, 2_048
"""Tokens that one program reads at once."""
_AHEAD = 2
"""Batches under way while one is read, so that the device does not wait for Python."""


class Likelihoods:
    """Scores options with one model; every shape is compiled once."""

    def __init__(
        self,
        decoder: Any,
        params: Any,
        *,
        window: int,
        batch_tokens: int = 4096,
        min_saved: int | None = None,
        journal: Journal | None = None,
    ):
        self.window = window
        self.vocab_size: int = decoder.model.vocab_size
        self.remembered: dict[Request, Likelihood] = {}
        """likelihoods that callers expect to need again"""
        self.num_tokens = 0
        """tokens read so far, padding included"""
        self._params = params
        model = decoder.model
        width = model.num_heads * model.head_dim
        position_bytes = 2 * model.num_layers * width * decoder.dtype.itemsize
        self._planner = BatchPlanner(batch_tokens, self.vocab_size, position_bytes, min_saved)
        self._journal = journal or Journal()
        self._read, self._score = _programs(decoder)
        self._cached: tuple[Trunk, Cache] | None = None

    @classmethod
    def of(cls, trained: Trained, journal: Journal | None = None) -> Self:
        """Those of a trained model; batches that the journal knows are taken from it."""
        return cls(
            *trained.unlooped,
            window=trained.window,
            batch_tokens=_CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else _BATCH_TOKENS,
            journal=journal,
        )

    def score(
        self,
        items: Sequence[Sequence[Request]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[list[Likelihood]]:
        """Likelihoods of every request (the options) of every item.

        What the requests of an item have in common is computed once, and so is what items have in
        common where that saves more than its programs cost to compile. `advance` is called with
        the number of requests that are done since its last call.

        Raises:
            CheckpointError: a likelihood is not a number.
        """
        found: dict[int, list[Likelihood]] = {}
        waiting: list[tuple[RequestBatch, str, Any]] = []
        for batch in self._planner.batches(items):
            key = inputs_digest(jax.tree.leaves((batch.trunk and batch.trunk.arrays, batch.arrays)))
            answer = self._journal.known.get(key) or self._start(batch)
            waiting.append((batch, key, answer))
            if len(waiting) > _AHEAD:
                found |= self._collect(*waiting.pop(0), advance)
        for each in waiting:
            found |= self._collect(*each, advance)
        self._cached = None
        flat = iter(each for index in sorted(found) for each in found[index])
        return [[next(flat) for _ in item] for item in items]

    def _start(self, batch: RequestBatch) -> tuple[jax.Array, jax.Array]:
        self.num_tokens += batch.shape.rows * batch.shape.row_tokens
        trunk_B, *arrays = batch.arrays
        trunk = None if batch.trunk is None else (self._cache(batch.trunk), trunk_B)
        return with_mesh_of(self._params, self._score)(self._params, trunk, *arrays)

    def _cache(self, trunk: Trunk) -> Cache:
        """The cache that holds a trunk; it is read when the first batch needs it."""
        if self._cached is None or self._cached[0] is not trunk:
            self._cached = None
            self.num_tokens += trunk.rows * trunk.positions
            read = with_mesh_of(self._params, self._read)
            self._cached = trunk, read(self._params, *trunk.arrays, rows=trunk.rows_at_once)
        return self._cached[1]

    def _collect(
        self, batch: RequestBatch, key: str, answer: Any, advance: Callable[[int], None]
    ) -> dict[int, list[Likelihood]]:
        """Likelihoods of every group of a batch, from the journal or out of its arrays."""
        if isinstance(answer, dict):
            likelihoods = batch.from_json(answer)
        else:
            likelihoods = batch.likelihoods(*(whole(each) for each in answer))
            self._journal.add(key, batch.to_json(likelihoods))
        advance(len(likelihoods))
        each = iter(likelihoods)
        groups = zip(batch.indices, batch.groups, strict=True)
        return {index: [next(each) for _ in group.requests] for index, group in groups}


@lru_cache(maxsize=8)
def _programs(decoder: Any) -> tuple[Any, Any]:
    """`_read` and `_score`, compiled once per shape for all weights of the same decoder."""
    read = jax.jit(partial(_read, decoder), static_argnames="rows")
    return read, jax.jit(partial(_score, decoder))


def _read(
    decoder: Any, params: Any, tokens_GS: jax.Array, segments_GS: jax.Array, *, rows: int
) -> Cache:
    """A cache that holds these tokens, read so many rows at a time."""

    def some(part: tuple[jax.Array, jax.Array]) -> Cache:
        cache = decoder.init_cache(*part[0].shape)
        return decoder.step(params, cache, *part)[1]

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
    params: Any,
    trunk: tuple[Cache, jax.Array] | None,
    prefix: Any,
    options: Any,
    scored: Any,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability [B, O, Y] of each target, and whether it is the most likely token.

    `trunk` is a cache and the row of it [B] that each row goes on from; `prefix` are tokens and
    segments [B, S] that the options share, `options` the same [B, O, T], and `scored` positions
    and targets [B, O, Y]. The model reads every option as a row of its own.
    """
    num_rows, num_options, T = options[0].shape
    tokens_BT, segments_BT = (x.reshape(-1, T) for x in options)
    if trunk is None and prefix is None:
        dispatch = decoder.eval_dispatch
        x_BTM, _ = decoder.hidden(params, tokens_BT, segments_BT, dispatch=dispatch)
    else:
        length = T if prefix is None else T + prefix[0].shape[1]
        if trunk is None:
            cache = decoder.init_cache(num_rows, length)
        else:
            cache = extended(select_rows(*trunk), length)
        if prefix is not None:
            _, cache = decoder.step(params, cache, *prefix)
        cache = select_rows(cache, jnp.repeat(jnp.arange(num_rows, dtype=jnp.int32), num_options))
        x_BTM, _ = decoder.step(params, cache, tokens_BT, segments_BT)
    positions_BY, targets_BY = (x.reshape(num_rows * num_options, -1) for x in scored)
    x_BYM = jnp.take_along_axis(x_BTM, positions_BY[:, :, None], axis=1)
    logits_BYV = decoder.logits(params, x_BYM).astype(jnp.float32)
    chosen_BY1 = jnp.take_along_axis(logits_BYV, targets_BY[:, :, None], axis=-1)
    top_BY1 = jnp.max(logits_BYV, axis=-1, keepdims=True)
    total_BY1 = jnp.sum(jnp.exp(logits_BYV - top_BY1), axis=-1, keepdims=True)
    logp_BY = (chosen_BY1 - top_BY1 - jnp.log(total_BY1))[:, :, 0]
    # The first of the largest, as argmax would say, which is slow on CPU.
    id_BYV = jax.lax.broadcasted_iota(jnp.int32, logits_BYV.shape, 2)
    before_BYV = jnp.less(id_BYV, targets_BY[:, :, None])
    is_tie_BYV = jnp.equal(logits_BYV, chosen_BY1)
    ahead_BYV = jnp.greater(logits_BYV, chosen_BY1) | (is_tie_BYV & before_BYV)
    greedy_BY = ~jnp.any(ahead_BYV, axis=-1)
    shape = (num_rows, num_options, -1)
    return logp_BY.reshape(shape), greedy_BY.reshape(shape)
