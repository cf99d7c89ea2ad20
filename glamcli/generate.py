"""Text from a model: greedy, sampled or by beam search, over a key/value cache.

A prompt is read in one compiled step of a few possible lengths; then one token per row and step.
Experts never drop a token unless the recipe says so, so texts follow the probabilities that scoring
reports. Padding, the beginning of a document and ids unknown to the tokenizer are never produced;
the end of a document ends a text.

Called by `glam generate`, by the sample at the end of training, and by tasks with free answers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.beam_search import NEVER, Hypothesis, Search, TextStream
from glamcli.data.tokenizer import Tokenizer
from glamcli.decoding import Decoding, Sampling
from glamcli.model.decoder import Decoder
from glamcli.model.kv_cache import Cache, select_rows
from glamcli.model.params import unstack_blocks
from glamcli.parallel.mesh import on_one_device, whole, with_mesh_of

MIN_PROMPT = 32
MIN_CACHE = 64
COMPILE_TOKENS, CPU_COMPILE_TOKENS = 262_144, 16_384
"""Tokens that are read in about the time that compiling another program takes."""


class Generator:
    """A model that continues texts. Programs are compiled once per shape and kept."""

    def __init__(self, decoder: Decoder, params: Any, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        decoder, params = unlooped(decoder, params)
        self._params = params
        read, following = _programs(decoder)
        self._read, self._next = with_mesh_of(params, read), with_mesh_of(params, following)
        allowed_V = np.zeros(decoder.model.vocab_size, bool)
        allowed_V[: tokenizer.vocab_size] = True
        allowed_V[[tokenizer.pad_id, tokenizer.bos_id]] = False
        self._allowed_V = jnp.asarray(allowed_V)
        on_cpu = jax.default_backend() == "cpu"
        self.compile_tokens = CPU_COMPILE_TOKENS if on_cpu else COMPILE_TOKENS
        self.shapes: set[tuple[int, int, int]] = set()
        """rows and `room` of batches so far, of callers that choose it"""
        self.before_token: Callable[[], object] = lambda: None
        """is called before every token of a text, or of several that grow side by side"""

    def stream(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        *,
        tokens: int = 128,
        samples: int = 1,
        seed: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """(sample, text) as text is completed; the samples grow side by side.

        The same seed gives the same texts; a sample does not depend on how many there are.
        """
        sampling = sampling or Sampling()
        ids = self.encode(prompt)
        cache, logits_1V = self._prefill([ids], tokens)
        rows_B = jnp.zeros((samples,), jnp.int32)
        cache, logits_BV = select_rows(cache, rows_B), jnp.repeat(logits_1V, samples, axis=0)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys_B = fold(jax.random.key(seed), jnp.arange(samples, dtype=jnp.int32))
        streams = [TextStream(self.tokenizer, ids) for _ in range(samples)]
        live = [True] * samples
        for step in range(tokens):
            self.before_token()
            chosen_B = _choose(logits_BV, self._allowed_V, keys_B, step, sampling=sampling)
            if step + 1 < tokens:  # the next step is under way while this one is shown
                logits_BV, cache = self._next(self._params, cache, chosen_B[:, None])
            for row, token_id in enumerate(whole(chosen_B).tolist()):
                if live[row] and token_id == self.tokenizer.eos_id:
                    live[row] = False
                elif live[row] and (text := streams[row].push(token_id)):
                    yield row, text
            if not any(live):
                break
        for row, stream in enumerate(streams):
            if text := stream.flush():
                yield row, text

    def continuations(self, prompt: str, decoding: Decoding) -> list[str]:
        """`samples` texts that follow a prompt; by beam search best first."""
        if decoding.beam is None:
            names = ("tokens", "samples", "seed")
            options = {name: getattr(decoding, name) for name in names}
            return self.texts(prompt, decoding.sampling, **options)
        search = {"width": decoding.beam, "tokens": decoding.tokens, "alpha": decoding.alpha}
        (found,) = self.beams([self.encode(prompt)], **search)
        return [each.text for each in found[: decoding.samples]]

    def texts(self, prompt: str, sampling: Sampling | None = None, **options: Any) -> list[str]:
        """The samples of `stream`, whole."""
        found = [""] * options.get("samples", 1)
        for row, text in self.stream(prompt, sampling, **options):
            found[row] += text
        return found

    def beams(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        width: int = 4,
        tokens: int = 64,
        alpha: float = 0.6,
        stop: Sequence[str] = (),
        room: tuple[int, int] | None = None,
    ) -> list[list[Hypothesis]]:
        """The best continuations of each prompt (ids with BOS), best first, up to `width` each.

        A score is the log-probability divided by ((5 + length) / 6)^alpha (GNMT, arXiv
        1609.08144; T5 uses 0.6, PaLM and others 0.8; 0 divides by 1). A text ends at the end of
        the document or at a stop text, looked for behind leading blanks. At the limit, texts that
        have not ended compete as they are. Width 1 with alpha 0 is greedy decoding.
        """
        searches = [Search(self.tokenizer, list(ids), width, alpha, tuple(stop)) for ids in prompts]
        cache, logits_BV = self._prefill(prompts, tokens, room)
        logits_RV = logits_BV
        if width > 1:
            rows_R = np.repeat(np.arange(len(prompts), dtype=np.int32), width)
            cache, logits_RV = select_rows(cache, jnp.asarray(rows_R)), logits_BV[rows_R]
        count = min(2 * width, int(self._allowed_V.sum()))
        for step in range(tokens):
            self.before_token()
            nats_RK, ids_RK = _best(logits_RV, self._allowed_V, count=count)
            nats_RK, ids_RK = whole(nats_RK), whole(ids_RK)
            parents, chosen = [], []
            for number, search in enumerate(searches):
                part = slice(number * width, (number + 1) * width)
                local, ids = search.extend(nats_RK[part], ids_RK[part])
                parents += [number * width + row for row in local]
                chosen += ids
            if step + 1 == tokens or all(search.settled(tokens) for search in searches):
                break
            chosen_R1 = np.array(chosen, np.int32)[:, None]
            # A single row is its own parent: its cache stays where it is.
            parents_R = np.array(parents, np.int32) if width > 1 else None
            logits_RV, cache = self._next(self._params, cache, chosen_R1, parents_R)
        return [search.results() for search in searches]

    def encode(self, prompt: str) -> list[int]:
        """BOS and the ids of a prompt."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], tokens: int, room: tuple[int, int] | None = None
    ) -> tuple[Cache, Array]:
        """A cache that holds the prompts with room for more, and the logits after each."""
        longest = max(len(ids) for ids in prompts)
        size, length = room or (
            rounded_up(longest, MIN_PROMPT),
            rounded_up(longest + tokens, MIN_CACHE),
        )
        tokens_BT = np.zeros((len(prompts), size), np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        for row, ids in enumerate(prompts):
            tokens_BT[row, : len(ids)] = ids
            segments_BT[row, : len(ids)] = 1
        last_B = np.array([len(ids) - 1 for ids in prompts], np.int32)
        return self._read(self._params, tokens_BT, segments_BT, last_B, length=max(length, size))


def unlooped(decoder: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The model as one device reads it fastest: a shallow one's blocks with arrays of their own,
    which is a copy. Or every token, and every batch, would copy weights out of their stacks."""
    if not on_one_device(params) or not decoder.is_shallow or decoder.apart:
        return decoder, params
    apart = jax.jit(unstack_blocks, static_argnums=1)(params, decoder.num_blocks)
    return decoder.for_one_device(), apart


@lru_cache(maxsize=8)
def _programs(decoder: Decoder) -> tuple[Any, Any]:
    """`_read` and `_next`, compiled once per shape for all generators with the same decoder: the
    weights of a later step need no compilation."""
    read = jax.jit(partial(_read, decoder), static_argnames="length")
    # The cache is donated to every step: it is updated in place.
    return read, jax.jit(partial(_next, decoder), donate_argnums=1)


def _read(
    decoder: Decoder,
    params: Any,
    tokens_BT: Array,
    segments_BT: Array,
    last_B: Array,
    *,
    length: int,
) -> tuple[Cache, Array]:
    """A new cache of `length` positions with the prompts; logits [B, V] after their last tokens."""
    cache = decoder.init_cache(tokens_BT.shape[0], length)
    x_BTM, cache = decoder.step(params, cache, tokens_BT, segments_BT)
    x_B1M = jnp.take_along_axis(x_BTM, last_B[:, None, None], axis=1)
    return cache, decoder.logits(params, x_B1M)[:, 0]


def _next(
    decoder: Decoder,
    params: Any,
    cache: Cache,
    tokens_B1: Array,
    parents_B: Array | None = None,
) -> tuple[Array, Cache]:
    """Logits [B, V] after one more token per row (of its parent row), and the cache with it."""
    if parents_B is not None:
        cache = select_rows(cache, parents_B)
    x_B1M, cache = decoder.step(params, cache, tokens_B1)
    return decoder.logits(params, x_B1M)[:, 0], cache


@partial(jax.jit, static_argnames="sampling")
def _choose(
    logits_BV: Array, allowed_V: Array, keys_B: Array, step: Array, *, sampling: Sampling
) -> Array:
    """The next token of every row."""
    logits_BV = jnp.where(allowed_V[None, :], logits_BV, NEVER)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if sampling.top_k is not None:
        rank_V = jnp.arange(ranked_BV.shape[-1], dtype=jnp.int32)
        ranked_BV = jnp.where(rank_V[None, :] < sampling.top_k, ranked_BV, NEVER)
    if sampling.top_p is not None:
        p_BV = jax.nn.softmax(ranked_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        ranked_BV = jnp.where(before_BV < sampling.top_p, ranked_BV, NEVER)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
    rank_B = jax.vmap(jax.random.categorical)(keys_B, ranked_BV)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnames="count")
def _best(logits_BV: Array, allowed_V: Array, *, count: int) -> tuple[Array, Array]:
    """Log-probabilities [B, count] and ids of the most likely next tokens.

    Ids that are not allowed are left out but keep their share of the probability, so that
    a text has the likelihood that scoring would give it.
    """
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return jax.lax.top_k(jnp.where(allowed_V[None, :], logp_BV, NEVER), count)


def rounded_up(count: int, smallest: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(smallest, 1 << (count - 1).bit_length())
