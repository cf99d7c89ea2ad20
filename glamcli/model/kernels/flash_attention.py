"""Causal attention inside segments on TPUs, as Pallas kernels that never form all logits.

Softmax is online over blocks of keys, and the backward pass computes it again from its logsumexp
(FlashAttention-2, section 3). Keys and values of a row stay in the chip's fast memory. The bias is
laid out there, once per head (`bias_band.py`). `attention.py` has the same for XLA;
`model/attention.py` chooses.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glamcli.model.kernels.attention import KEPT, MASKED
from glamcli.model.kernels.bias_band import lay_out, matrix_of, sum_diagonals
from glamcli.model.kernels.linear import platform
from glamcli.parallel.axes import GLAM, Layout

_LANES = 128
"""Width of a TPU's registers: one head of 128 or a pair of 64 are attended at a time."""

_ROWS = ("batch", None, "act_heads", None)
_BAND = ("batch", "act_heads", None)
_SEGMENTS = ("batch", None, None, None)
_BY_QUERY = ("batch", "act_heads", None, None, None)


def flash_attention(
    q_BSND: Array,
    k_BSND: Array,
    v_BSND: Array,
    band_XNw: Array,
    segments_BS: Array,
    *,
    zero_logit: bool,
    layout: Layout = GLAM,
) -> Array:
    """Causal attention of whole rows over themselves inside segments, [B, S, N, D], as
    `attention.attend` has it; off TPUs interpreted, which only tests want.

    Shapes: `band_XNw` is a copy per data shard of the bias at `band_distances` of w / 2, the size
    of a block. What shapes fit is `config.sizes.flash_block`'s to say.
    """
    B, S, _, _ = q_BSND.shape
    block = band_XNw.shape[2] // 2
    segments_BX1b = segments_BS.reshape(B, S // block, 1, block)
    options = (layout, zero_logit, platform() != "tpu")
    return _attention(options, q_BSND, k_BSND, v_BSND, band_XNw, segments_BX1b)


def _forward(options: tuple[Layout, bool, bool], *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    layout, zero_logit, interpret = options
    run = partial(_run_forward, zero_logit=zero_logit, interpret=interpret)
    split = layout.on_each_device(run, (*(_ROWS,) * 3, _BAND, _SEGMENTS), (_ROWS, _BY_QUERY))
    a_BSND, logz = (checkpoint_name(x, KEPT) for x in split(*arrays))
    return a_BSND, (*arrays, a_BSND, logz)


def _backward(options: tuple[Layout, bool, bool], kept: tuple[Array, ...], d_a_BSND: Array):
    layout, _, interpret = options
    in_axes = (*(_ROWS,) * 3, _BAND, _SEGMENTS, _ROWS, _BY_QUERY, _ROWS)
    run = partial(_run_backward, interpret=interpret)
    split = layout.on_each_device(run, in_axes, (*(_ROWS,) * 3, _BAND))
    return *split(*kept, d_a_BSND), None


_attention = jax.custom_vjp(lambda *a: _forward(*a)[0], nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _run_forward(q_BSND, k_BSND, v_BSND, band_1Nw, segments, *, zero_logit, interpret):
    """One device's sums of values, and logsumexp of its logits by block [B, N, S / b, 1, b]."""
    shapes = _Shapes(q_BSND, band_1Nw)
    B, S, N, D = q_BSND.shape
    b, num_blocks = shapes.block, shapes.num_blocks
    a_BSK, logz = pl.pallas_call(
        partial(_forward_kernel, D, zero_logit),
        grid=shapes.grid,
        in_specs=[shapes.queries, shapes.keys, shapes.keys, shapes.band, shapes.segments],
        out_specs=[shapes.queries, shapes.by_query],
        out_shape=[
            jax.ShapeDtypeStruct((B, S, N * D), q_BSND.dtype),
            jax.ShapeDtypeStruct((B, N, num_blocks, 1, b), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((shapes.heads, 3, b, b), jnp.float32)],
        cost_estimate=shapes.cost(2, 4),
        name="attention_forward",
        **_compiled_as(interpret),
    )(*map(_merged, (q_BSND, k_BSND, v_BSND)), jnp.swapaxes(band_1Nw, 0, 1), segments)
    return a_BSK.reshape(q_BSND.shape), logz


def _run_backward(q_BSND, k_BSND, v_BSND, band_1Nw, segments, a_BSND, logz, d_a_BSND, *, interpret):
    """One device's gradients of queries, keys, values and the band."""
    shapes = _Shapes(q_BSND, band_1Nw)
    B, S, N, D = q_BSND.shape
    b = shapes.block
    merged = jax.ShapeDtypeStruct((B, S, N * D), q_BSND.dtype)
    *d_qkv, d_band_N1w = pl.pallas_call(
        partial(_backward_kernel, D),
        grid=shapes.grid,
        in_specs=[
            *(shapes.queries, shapes.keys, shapes.keys, shapes.band, shapes.segments),
            *(shapes.queries, shapes.by_query, shapes.queries),
        ],
        out_specs=[shapes.queries, shapes.keys, shapes.keys, shapes.band],
        out_shape=[merged, merged, merged, jax.ShapeDtypeStruct((N, 1, 2 * b), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((shapes.heads, 3, b, b), jnp.float32),
            pltpu.VMEM((shapes.heads, 3, b, b), jnp.float32),
            pltpu.VMEM((S, shapes.heads * D), jnp.float32),
            pltpu.VMEM((S, shapes.heads * D), jnp.float32),
        ],
        cost_estimate=shapes.cost(5, 8),
        name="attention_backward",
        **_compiled_as(interpret),
    )(
        *map(_merged, (q_BSND, k_BSND, v_BSND)),
        jnp.swapaxes(band_1Nw, 0, 1),
        segments,
        _merged(a_BSND),
        logz,
        _merged(d_a_BSND),
    )
    return *(x.reshape(q_BSND.shape) for x in d_qkv), jnp.swapaxes(d_band_N1w, 0, 1)


class _Shapes:
    """The grid (heads, rows, blocks of queries) and what a step of it sees of every array."""

    def __init__(self, q_BSND: Array, band_1Nw: Array):
        self.B, self.S, self.N, self.D = q_BSND.shape
        self.size = q_BSND.dtype.itemsize
        self.block = band_1Nw.shape[2] // 2
        self.heads = max(1, _LANES // self.D)
        self.num_blocks = self.S // self.block
        self.grid = (self.N // self.heads, self.B, self.num_blocks)
        b, width = self.block, self.heads * self.D
        self.queries = pl.BlockSpec((1, b, width), lambda n, r, i: (r, i, n))
        self.keys = pl.BlockSpec((1, self.S, width), lambda n, r, i: (r, 0, n))
        self.band = pl.BlockSpec((self.heads, 1, 2 * b), lambda n, r, i: (n, 0, 0))
        self.segments = pl.BlockSpec((1, self.num_blocks, 1, b), lambda n, r, i: (r, 0, 0, 0))
        self.by_query = pl.BlockSpec((1, self.heads, 1, 1, b), lambda n, r, i: (r, n, i, 0, 0))

    def cost(self, num_products: int, num_arrays: int) -> pl.CostEstimate:
        """That of so many products over the blocks that are not all masked, and of reading and
        writing so many arrays of the size of the queries, and the statistics."""
        pairs = self.B * self.N * self.S * (self.S + self.block) // 2
        values = self.B * self.S * self.N
        return pl.CostEstimate(
            flops=2 * num_products * pairs * self.D,
            transcendentals=pairs,
            bytes_accessed=num_arrays * values * self.D * self.size + 4 * values,
        )


def _merged(x_BSND: Array) -> Array:
    return x_BSND.reshape(*x_BSND.shape[:2], -1)


def _compiled_as(interpret: bool) -> dict[str, Any]:
    """Heads are independent of each other and may run on a chip's two cores at once."""
    order = ("parallel", "arbitrary", "arbitrary")
    params = pltpu.CompilerParams(dimension_semantics=order)
    return {"interpret": interpret, "compiler_params": params}


def _forward_kernel(D, zero_logit, q_ref, k_ref, v_ref, band_ref, seg_ref, a_ref, logz_ref, bias):
    i = pl.program_id(2)
    block = q_ref.shape[1]
    pl.when((pl.program_id(1) == 0) & (i == 0))(partial(lay_out, band_ref, bias))
    segment_b1 = _column(seg_ref[0, i])
    for head in range(bias.shape[0]):
        part = slice(head * D, (head + 1) * D)
        q_bD = q_ref[0, :, part]

        def over_keys(j, carry, part=part, q_bD=q_bD, head=head):
            top_b1, total_b1, sum_bD = carry
            keys = pl.ds(pl.multiple_of(j * block, block), block)
            logits_bb = _logits(q_bD, k_ref[0, keys, part], bias[head, matrix_of(i, j)])
            logits_bb = jnp.where(segment_b1 == seg_ref[0, j], logits_bb, MASKED)
            new_b1 = jnp.maximum(top_b1, jnp.max(logits_bb, axis=1, keepdims=True))
            weight_bb, shrink_b1 = jnp.exp(logits_bb - new_b1), jnp.exp(top_b1 - new_b1)
            total_b1 = total_b1 * shrink_b1 + jnp.sum(weight_bb, axis=1, keepdims=True)
            v_bD = v_ref[0, keys, part]
            return new_b1, total_b1, sum_bD * shrink_b1 + _dot(weight_bb.astype(v_bD.dtype), v_bD)

        # The zero logit is an entry that was seen before all keys.
        top_b1 = jnp.full((block, 1), 0.0 if zero_logit else MASKED, jnp.float32)
        total_b1 = jnp.full((block, 1), 1.0 if zero_logit else 0.0, jnp.float32)
        start = (top_b1, total_b1, jnp.zeros((block, D), jnp.float32))
        top_b1, total_b1, sum_bD = jax.lax.fori_loop(0, i + 1, over_keys, start)
        a_ref[0, :, part] = (sum_bD / total_b1).astype(a_ref.dtype)
        logz_ref[0, head, 0] = _row(top_b1 + jnp.log(total_b1))


def _backward_kernel(
    D, q_ref, k_ref, v_ref, band_ref, seg_ref, a_ref, logz_ref, d_a_ref, *results_and_scratch
):
    d_q_ref, d_k_ref, d_v_ref, d_band_ref, bias, d_bias, d_k, d_v = results_and_scratch
    r, i = pl.program_id(1), pl.program_id(2)
    is_last = i == pl.num_programs(2) - 1
    block = q_ref.shape[1]

    @pl.when((r == 0) & (i == 0))
    def _():
        lay_out(band_ref, bias)
        d_bias[...] = jnp.zeros_like(d_bias)

    @pl.when(i == 0)
    def _():
        d_k[...] = jnp.zeros_like(d_k)
        d_v[...] = jnp.zeros_like(d_v)

    segment_b1 = _column(seg_ref[0, i])
    for head in range(bias.shape[0]):
        part = slice(head * D, (head + 1) * D)
        q_bD, d_a_bD = q_ref[0, :, part], d_a_ref[0, :, part]
        logz_b1 = _column(logz_ref[0, head, 0])
        shared_bD = d_a_bD.astype(jnp.float32) * a_ref[0, :, part].astype(jnp.float32)
        shared_b1 = jnp.sum(shared_bD, axis=1, keepdims=True)

        def over_keys(j, d_q_bD, part=part, head=head, of_query=(q_bD, d_a_bD, logz_b1, shared_b1)):
            q_bD, d_a_bD, logz_b1, shared_b1 = of_query
            keys, band = pl.ds(pl.multiple_of(j * block, block), block), matrix_of(i, j)
            k_bD = k_ref[0, keys, part]
            logits_bb = _logits(q_bD, k_bD, bias[head, band])
            logits_bb = jnp.where(segment_b1 == seg_ref[0, j], logits_bb, MASKED)
            weight_bb = jnp.exp(logits_bb - logz_b1)
            d_weight_bb = _dot(d_a_bD, v_ref[0, keys, part], (1, 1))
            d_logits_bb = weight_bb * (d_weight_bb - shared_b1)
            d_bias[head, band] += d_logits_bb
            d_bb = d_logits_bb.astype(q_bD.dtype)
            d_k[keys, part] += _dot(d_bb, q_bD, (0, 0))
            d_v[keys, part] += _dot(weight_bb.astype(q_bD.dtype), d_a_bD, (0, 0))
            return d_q_bD + _dot(d_bb, k_bD)

        d_q_bD = jax.lax.fori_loop(0, i + 1, over_keys, jnp.zeros((block, D), jnp.float32))
        d_q_ref[0, :, part] = d_q_bD.astype(d_q_ref.dtype)

    @pl.when(is_last)
    def _():
        d_k_ref[0] = d_k[...].astype(d_k_ref.dtype)
        d_v_ref[0] = d_v[...].astype(d_v_ref.dtype)

    pl.when(is_last & (r == pl.num_programs(1) - 1))(partial(sum_diagonals, d_bias, d_band_ref))


def _logits(q_bD: Array, k_bD: Array, bias_bb: Array) -> Array:
    return _dot(q_bD, k_bD, (1, 1)) + bias_bb


def _dot(x: Array, y: Array, contracted: tuple[int, int] = (1, 0)) -> Array:
    """The product of two matrices over these dimensions, float32."""
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _column(row_1b: Array) -> Array:
    return jnp.broadcast_to(row_1b, (_LANES, row_1b.shape[1])).T[:, :1]


def _row(column_b1: Array) -> Array:
    return jnp.broadcast_to(column_b1, (column_b1.shape[0], _LANES)).T[:1]
