"""The experts of a layer as functions of rows, w_out . activation(w_in . x), with their gradients.

`dispatch.py` calls these on rows that are already sorted by expert. Weights come in as the float32
masters; products run in the dtype of x, accumulate and return float32, and are rounded to the dtype
of x afterwards; gradients of weights stay float32. Asking a product of bfloat16 operands for a
float32 result is also what keeps it fast on CPU: with a bfloat16 result XLA converts both operands
to float32 first, copies of all expert weights included. The backward passes are written out because
JAX's own would multiply float32 by bfloat16.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from glamcli.model.kernels.activation import Activation, activate, keep, slope
from glamcli.model.kernels.linear import on_one_cpu, platform, sum_over_rows
from glamcli.parallel.axes import GLAM, Layout

Dropless = Literal["loop", "pallas"]

MIN_PIECE = 8
"""Rows of the smallest product with an expert's weights: fewer cost as much."""


class Experts(NamedTuple):
    """All experts of one layer, to be applied to rows that are sorted by expert."""

    w_in_EMH: Array
    w_out_EMH: Array
    activation: Activation
    layout: Layout = GLAM
    dropless: Dropless = "loop"

    @property
    def num_experts(self) -> int:
        return self.w_in_EMH.shape[0]

    @jax.named_scope("experts")
    def on_slots(self, x_EGCM: Array) -> Array:
        """Outputs [E, G, C, M]: one batched product per matrix."""
        return _slotted(x_EGCM, self.w_in_EMH, self.w_out_EMH, self.activation, self.layout)

    @jax.named_scope("experts")
    def on_blocks(
        self,
        x_QM: Array,
        expert_of_block: Array,
        used_of_block: Array,
        num_blocks: Array,
        expected_blocks: int,
    ) -> Array:
        """Outputs [Q, M] of equal blocks of rows, each of one expert; zeros past `num_blocks`.

        Of each block the first `used_of_block` rows are in use; outputs of the others mean nothing.
        Rows past `num_blocks` are zeros in x as well. Cost follows the blocks in use, a number
        known only at run time; `expected_blocks` is what compilers are told. What the loop writes
        is float32 throughout: XLA on CPU widens a whole bfloat16 array to change a part of it.
        """
        arrays = x_QM, self.w_in_EMH, self.w_out_EMH, expert_of_block
        if self.dropless == "pallas" and platform() == "tpu":
            from glamcli.model.kernels import blocks  # Pallas takes a while to import

            if blocks.tiles_fit(*self.w_in_EMH.shape[1:]):
                return blocks.on_blocks(self.activation, expected_blocks, *arrays, num_blocks)
        return _blocked(*arrays, used_of_block, num_blocks, self.activation)


def _slotted_forward(
    x_EGCM: Array, w_in_EMH: Array, w_out_EMH: Array, act: Activation, layout: Layout
) -> tuple[Array, tuple[Array, ...]]:
    x_EGCM = _with_experts(layout, x_EGCM, "act_expert_embed")
    raw_EGCH = _float32("EGCM,EMH->EGCH", x_EGCM, w_in_EMH.astype(x_EGCM.dtype))
    kept_EGCH = keep(act, raw_EGCH).astype(x_EGCM.dtype)
    kept_EGCH = _with_experts(layout, kept_EGCH, "act_expert_mlp")
    h_EGCH = activate(act, kept_EGCH)
    out_EGCM = _over_inside(layout, h_EGCH, w_out_EMH)
    out_EGCM = _with_experts(layout, out_EGCM, "act_expert_embed")
    return out_EGCM, (x_EGCM, kept_EGCH, w_in_EMH, w_out_EMH)


def _slotted_backward(
    act: Activation, layout: Layout, saved: tuple[Array, ...], dout_EGCM: Array
) -> tuple[Array, Array, Array]:
    x_EGCM, kept_EGCH, w_in_EMH, w_out_EMH = saved
    dtype = x_EGCM.dtype
    dout_EGCM = _with_experts(layout, dout_EGCM, "act_expert_embed")
    dh_EGCH = _float32("EGCM,EMH->EGCH", dout_EGCM, w_out_EMH.astype(dtype))
    draw_EGCH = slope(act, kept_EGCH, dh_EGCH).astype(dtype)
    draw_EGCH = _with_experts(layout, draw_EGCH, "act_expert_mlp")
    h_EGCH = activate(act, kept_EGCH)
    dw_out_EMH = _weight_gradient(dout_EGCM, h_EGCH)
    dw_in_EMH = _weight_gradient(x_EGCM, draw_EGCH)
    dx_EGCM = _over_inside(layout, draw_EGCH, w_in_EMH)
    return _with_experts(layout, dx_EGCM, "act_expert_embed"), dw_in_EMH, dw_out_EMH


_slotted = jax.custom_vjp(lambda *a: _slotted_forward(*a)[0], nondiff_argnums=(3, 4))
_slotted.defvjp(_slotted_forward, _slotted_backward)


def _blocked_forward(
    x_QM: Array,
    w_in_EMH: Array,
    w_out_EMH: Array,
    expert_of_block: Array,
    used_of_block: Array,
    num_blocks: Array,
    act: Activation,
) -> tuple[Array, tuple[Array, ...]]:
    del used_of_block
    Q, M = x_QM.shape
    H = w_in_EMH.shape[2]
    dtype = x_QM.dtype
    block = Q // expert_of_block.shape[0]

    def run(i, carry):
        kept_QH, out_QM = carry
        expert = expert_of_block[i]
        x_bM = _slice(x_QM, i * block, block)
        raw_bH = _float32("bM,MH->bH", x_bM, _one(w_in_EMH, expert, dtype))
        kept_bH = keep(act, raw_bH).astype(dtype)
        h_bH = activate(act, kept_bH)
        out_bM = _float32("bH,MH->bM", h_bH, _one(w_out_EMH, expert, dtype))
        return _put(kept_QH, kept_bH, i * block), _put(out_QM, out_bM, i * block)

    nothing = jnp.zeros((Q, H), jnp.float32), jnp.zeros((Q, M), jnp.float32)
    kept_QH, out_QM = jax.lax.fori_loop(0, num_blocks, run, nothing)
    return out_QM.astype(dtype), (x_QM, kept_QH, w_in_EMH, w_out_EMH, expert_of_block, num_blocks)


def _blocked_backward(act: Activation, saved: tuple[Array, ...], dout_QM: Array) -> tuple:
    x_QM, kept_QH, w_in_EMH, w_out_EMH, expert_of_block, num_blocks = saved
    dtype = x_QM.dtype
    block = x_QM.shape[0] // expert_of_block.shape[0]

    def run(i, carry):
        dx_QM, dw_in_EMH, dw_out_EMH = carry
        expert = expert_of_block[i]
        x_bM, kept_bH, dout_bM = (
            _slice(a, i * block, block).astype(dtype) for a in (x_QM, kept_QH, dout_QM)
        )
        dh_bH = _float32("bM,MH->bH", dout_bM, _one(w_out_EMH, expert, dtype))
        draw_bH = slope(act, kept_bH, dh_bH).astype(dtype)
        dx_bM = _float32("bH,MH->bM", draw_bH, _one(w_in_EMH, expert, dtype))
        dw_in_MH = sum_over_rows(x_bM, draw_bH)
        dw_out_MH = sum_over_rows(dout_bM, activate(act, kept_bH))
        dw_in_1MH = _slice(dw_in_EMH, expert, 1) + dw_in_MH[None]
        dw_out_1MH = _slice(dw_out_EMH, expert, 1) + dw_out_MH[None]
        return (
            _put(dx_QM, dx_bM, i * block),
            _put(dw_in_EMH, dw_in_1MH, expert),
            _put(dw_out_EMH, dw_out_1MH, expert),
        )

    nothing = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x_QM, w_in_EMH, w_out_EMH))
    dx_QM, dw_in_EMH, dw_out_EMH = jax.lax.fori_loop(0, num_blocks, run, nothing)
    return dx_QM.astype(dtype), dw_in_EMH, dw_out_EMH, None, None, None


def _blocked_outputs(
    x_QM: Array,
    w_in_EMH: Array,
    w_out_EMH: Array,
    expert_of_block: Array,
    used_of_block: Array,
    num_blocks: Array,
    act: Activation,
) -> Array:
    """`_blocked_forward` without what a gradient needs; on one CPU of the rows in use alone."""
    args = x_QM, w_in_EMH, w_out_EMH, expert_of_block, used_of_block, num_blocks
    if not on_one_cpu():
        return _blocked_forward(*args, act)[0]
    dtype, block = x_QM.dtype, x_QM.shape[0] // expert_of_block.shape[0]
    # A block, its half, quarter and eighth: what is in use is a sum of them.
    pieces = [piece for piece in (block >> n for n in range(4)) if piece >= MIN_PIECE]

    def run(i, out_QM):
        expert = expert_of_block[i]
        # Copied once per block, not once per product.
        weights = (_one(w_EMH, expert, dtype) for w_EMH in (w_in_EMH, w_out_EMH))
        w_in_MH, w_out_MH = jax.lax.optimization_barrier(tuple(weights))

        def put(num_rows, start, out_QM):
            x_bM = _slice(x_QM, start, num_rows)
            kept_bH = keep(act, _float32("bM,MH->bH", x_bM, w_in_MH)).astype(dtype)
            # The few rows are turned, or the product would turn the weights.
            h_Hb = jax.lax.optimization_barrier(activate(act, kept_bH).T)
            out_Mb = jax.lax.optimization_barrier(_float32("MH,Hb->Mb", w_out_MH, h_Hb))
            return _put(out_QM, out_Mb.T, start)

        start, left = i * block, -(-used_of_block[i] // pieces[-1]) * pieces[-1]
        for piece in pieces:
            fits = left >= piece
            run_piece = partial(put, piece, start)
            out_QM = jax.lax.cond(fits, run_piece, lambda out_QM: out_QM, out_QM)
            done = jnp.where(fits, piece, 0)
            start, left = start + done, left - done
        return out_QM

    nothing = jnp.zeros(x_QM.shape, jnp.float32)
    return jax.lax.fori_loop(0, num_blocks, run, nothing).astype(dtype)


_blocked = jax.custom_vjp(_blocked_outputs, nondiff_argnums=(6,))
_blocked.defvjp(_blocked_forward, _blocked_backward)


_slice = jax.lax.dynamic_slice_in_dim


def _over_inside(layout: Layout, a_EGCH: Array, w_EMH: Array) -> Array:
    """The product over H, [E, G, C, M] in the dtype of a. Where H is split, what is sent to be
    added up has the dtype of the product: float32, or bfloat16 by `mesh.expert_sums`."""
    w_EMH = w_EMH.astype(a_EGCH.dtype)
    num_parts = layout.num_parts(a_EGCH.shape[-1:], ("act_expert_mlp",))
    sent = layout.expert_sums if num_parts > 1 else jnp.float32
    return _product("EGCH,EMH->EGCM", a_EGCH, w_EMH, sent).astype(a_EGCH.dtype)


def _float32(spec: str, a: Array, b: Array) -> Array:
    """The einsum, accumulated and returned in float32."""
    return _product(spec, a, b, jnp.float32)


def _product(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """The einsum, returned in this dtype."""
    product = partial(jnp.einsum, spec, preferred_element_type=dtype)
    if a.dtype == jnp.float32 or platform() != "cpu":
        return product(a, b)
    # XLA on CPU folds a neighbour's transpose into a product and then may find that it has no
    # batched bfloat16 product of that layout: an error at run time. The barriers keep it out.
    a, b = jax.lax.optimization_barrier((a, b))
    return jax.lax.optimization_barrier(product(a, b))


def _weight_gradient(outside_EGCM: Array, inside_EGCH: Array) -> Array:
    """The sum over an expert's rows, [E, M, H] in float32."""
    if not on_one_cpu():
        return _float32("EGCM,EGCH->EMH", outside_EGCM, inside_EGCH)
    E, M, H = outside_EGCM.shape[0], outside_EGCM.shape[-1], inside_EGCH.shape[-1]
    return sum_over_rows(outside_EGCM.reshape(E, -1, M), inside_EGCH.reshape(E, -1, H))


def _with_experts(layout: Layout, x_EGCM: Array, last: str) -> Array:
    return layout.constrain(x_EGCM, "act_expert", "expert_group", None, last)


def _one(w_EMH: Array, expert: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.dynamic_index_in_dim(w_EMH, expert, keepdims=False).astype(dtype)


def _put(a: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, rows.astype(a.dtype), start, 0)
