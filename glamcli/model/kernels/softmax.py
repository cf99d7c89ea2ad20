"""Cross entropy over a large vocabulary: float32 logits that are never all in memory at once.

On a mesh the vocabulary stays split: a device forms the logits of its own rows against its own
part of the table, and three small sums over the devices (a maximum, a total, the target's logit)
make the loss (Megatron-LM, section 3). Chunks are parts of the sequence, so that rows stay where
they are. The gradient is written out: it adds up the table's over all chunks before anything is
sent, and leaves every result split as its owner wants it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.config.nearest import divisors
from glamcli.model.kernels.linear import einsum32, sum_over_rows
from glamcli.parallel.axes import GLAM, Layout, first_row, num_devices

CHUNK_BYTES = 512 * 2**20
"""Float32 logits of one chunk, per device. Small models fit whole, which is fastest; a large
vocabulary wants many tokens in a product, and its gradient is added up once per chunk."""

ROWS = ("outer_batch", None, None)
TABLE = ("act_vocab", None)
LOGITS = ("outer_batch", None, "act_vocab")
BY_TOKEN = ("outer_batch", None)


@jax.named_scope("softmax")
def logits(x_BSM: Array, table_VM: Array, layout: Layout = GLAM) -> Array:
    """Float32 logits [B, S, V] of hidden states in their own dtype against the embedding table."""
    return layout.constrain(_logits(x_BSM, table_VM.astype(x_BSM.dtype)), *LOGITS)


def losses(
    x_BSM: Array,
    table_VM: Array,
    targets_BS: Array,
    layout: Layout = GLAM,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Array, Array]:
    """-log p of every target, and logsumexp of its logits (for the z-loss), float32 [B, S] each.

    With more than one chunk logits are computed again for the gradient.
    """
    (B, S, _), V = x_BSM.shape, table_VM.shape[0]
    parts = layout.num_parts((B, S, V), LOGITS)
    num = num_chunks(B, S, V, chunk_bytes * parts)
    with jax.named_scope("softmax"):
        return _losses(layout, num, x_BSM, table_VM, targets_BS)


def num_chunks(rows: int, row_tokens: int, vocab_size: int, chunk_bytes: int) -> int:
    """The fewest equal parts of a row whose logits stay below `chunk_bytes` (or single tokens)."""
    needed = math.ceil(rows * row_tokens * vocab_size * 4 / chunk_bytes)
    return next((n for n in divisors(row_tokens) if n >= needed), row_tokens)


def _forward(layout: Layout, num: int, x_BSM: Array, table_VM: Array, targets_BS: Array):
    vocab = layout.here("act_vocab", table_VM.shape[0])
    keep = num == 1

    def run(x_BSM: Array, table_VM: Array, targets_BS: Array):
        first = first_row(vocab, table_VM)

        def chunk(part: tuple[Array, Array]):
            x_BSM, targets_BS = part
            logits_BSV = _logits(x_BSM, table_VM)
            top_BS = _over(jax.lax.pmax, jnp.max(logits_BSV, axis=-1), vocab)
            total_BS = jnp.sum(jnp.exp(logits_BSV - top_BS[..., None]), axis=-1)
            logz_BS = jnp.log(_over(jax.lax.psum, total_BS, vocab)) + top_BS
            chosen_BS = _over(jax.lax.psum, _chosen(logits_BSV, targets_BS - first), vocab)
            return None, (logz_BS - chosen_BS, logz_BS, logits_BSV if keep else None)

        return _by_chunk(chunk, num, (x_BSM, targets_BS))[1]

    split = layout.on_each_device(
        run, (ROWS, TABLE, BY_TOKEN), (BY_TOKEN, BY_TOKEN, LOGITS if keep else None)
    )
    nats_BS, logz_BS, logits_BSV = split(x_BSM, table_VM.astype(x_BSM.dtype), targets_BS)
    return (nats_BS, logz_BS), (x_BSM, table_VM, targets_BS, logz_BS, logits_BSV)


def _backward(layout: Layout, num: int, kept, gradients: tuple[Array, Array]):
    x_BSM, table_VM, targets_BS, logz_BS, logits_BSV = kept
    (B, S, M), V = x_BSM.shape, table_VM.shape[0]
    vocab, rows = layout.here("act_vocab", V), layout.here("outer_batch", B)
    sizes = {"seq": S, "act_embed": M, "embed": M}
    x_axes = ("outer_batch", *layout.within(vocab, ("seq", "act_embed"), sizes))
    table_axes = ("act_vocab", *layout.within(rows, ("embed",), sizes))
    table_dtype = table_VM.dtype

    def run(x_BSM: Array, table_VM: Array, targets_BS: Array, *by_token: Array):
        first = first_row(vocab, table_VM)

        def chunk(part: tuple[Array, ...]) -> tuple[Array, Array]:
            x_BSM, targets_BS, logz_BS, d_nats_BS, d_logz_BS, *logits = part
            logits_BSV = logits[0] if logits else _logits(x_BSM, table_VM)
            # nats = logz - chosen and d logz / d logits = p.
            scale_BS = d_nats_BS + d_logz_BS
            d_logits_BSV = jnp.exp(logits_BSV - logz_BS[..., None]) * scale_BS[..., None]
            d_logits_BSV = _take_off(d_logits_BSV, targets_BS - first, d_nats_BS)
            d_logits_BSV = d_logits_BSV.astype(x_BSM.dtype)
            d_x_BSM = jnp.einsum("BSV,VM->BSM", d_logits_BSV, table_VM)
            d_table_VM = sum_over_rows(*(x.reshape(-1, x.shape[-1]) for x in (d_logits_BSV, x_BSM)))
            return d_table_VM.astype(table_dtype), d_x_BSM

        d_table_VM, d_x_BSM = _by_chunk(chunk, num, (x_BSM, targets_BS, *by_token))
        d_x_BSM = layout.summed(d_x_BSM, vocab, x_axes, sizes)
        return d_x_BSM, layout.summed(d_table_VM, rows, table_axes, sizes)

    arrays = (x_BSM, table_VM.astype(x_BSM.dtype), targets_BS, logz_BS, *gradients)
    axes = (ROWS, TABLE, *(BY_TOKEN,) * 4)
    if logits_BSV is not None:
        arrays, axes = (*arrays, logits_BSV), (*axes, LOGITS)
    split = layout.on_each_device(run, axes, (x_axes, table_axes), sizes)
    return *split(*arrays), None


_losses = jax.custom_vjp(lambda *a: _forward(*a)[0], nondiff_argnums=(0, 1))
_losses.defvjp(_forward, _backward)


_logits = partial(einsum32, "BSM,VM->BSV")


def _over(reduce: Callable[..., Array], x: Array, axes: tuple[str, ...]) -> Array:
    return reduce(x, axes) if axes else x


# Targets are picked by index on one device, which is fast, and by comparison on a mesh, where an
# id may belong to another device and matches nothing here.


def _chosen(logits_BSV: Array, targets_BS: Array) -> Array:
    """The targets' logits, 0 for those of other devices."""
    if num_devices() == 1:
        return jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(_is_target(targets_BS, logits_BSV), logits_BSV, 0.0), axis=-1)


def _take_off(d_logits_BSV: Array, targets_BS: Array, d_nats_BS: Array) -> Array:
    """The gradient without what the targets' own logits take off the loss."""
    if num_devices() == 1:
        row_B1, token_1S = jnp.ogrid[: targets_BS.shape[0], : targets_BS.shape[1]]
        return d_logits_BSV.at[row_B1, token_1S, targets_BS].add(-d_nats_BS)
    own_BSV = _is_target(targets_BS, d_logits_BSV)
    return d_logits_BSV - jnp.where(own_BSV, d_nats_BS[..., None], 0.0)


def _is_target(targets_BS: Array, logits_BSV: Array) -> Array:
    vocab_BSV = jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2)
    return jnp.equal(vocab_BSV, targets_BS[..., None])


def _by_chunk(run: Callable[..., Any], num: int, rows: Any) -> tuple[Any, Any]:
    """`run` over equal parts of the rows [B, S, ...], one after the other: the sum of its first
    results, and its second ones put together again."""
    if num == 1:
        return run(rows)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        more, result = run(part)
        return jax.tree.map(jnp.add, total, more), result

    parts = jax.tree.map(partial(_cut, num), rows)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    shape = jax.eval_shape(run, first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    total, results = jax.lax.scan(add, zeros, parts)
    return total, jax.tree.map(_join, results)


def _cut(num: int, x_BS: Array) -> Array:
    B, S, *rest = x_BS.shape
    return jnp.moveaxis(x_BS.reshape(B, num, S // num, *rest), 1, 0)


def _join(x_XBS: Array) -> Array:
    X, B, S, *rest = x_XBS.shape
    return jnp.moveaxis(x_XBS, 0, 1).reshape(B, X * S, *rest)
