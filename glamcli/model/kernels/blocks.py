"""The experts on blocks of rows as Pallas kernels for TPUs: the loop of `experts.py`, fused.

Two kernels make the six products of both passes. `_products` multiplies every block by its
expert's weight, tile by tile, and applies the activation or its slope before a result leaves the
chip's memory; `_sums_over_rows` adds up weight gradients in float32, an expert's blocks one after
the other. Both take as many steps as blocks are in use, a number known only at run time, and round
where the loop does. Weights come as the float32 masters.

No TPU has run this yet: tests interpret it on a CPU and compile it for TPUs that are described.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glamcli.model.kernels.activation import Activation, activate, keep, slope
from glamcli.model.kernels.linear import platform

TPU_LANES = 128
WIDE_BYTES, NARROW_BYTES = 2048, 1024
"""Rows of tiles, in the dtype of x: of results, and of what is summed over. With 512 rows all tiles
of a step, those being moved and the float32 sums fit the 16 MiB that v4 and v5e give a kernel."""

STRIP_ROWS = 64
"""Rows that are finished at once: more would not stay in registers."""


def tiles_fit(model_dim: int, ffn_dim: int) -> bool:
    """Whether weights of these widths can be cut into tiles of a TPU."""
    return model_dim % TPU_LANES == ffn_dim % TPU_LANES == 0


def _forward(
    act: Activation,
    expected: int,
    x_QM: Array,
    w_in_EMH: Array,
    w_out_EMH: Array,
    expert_of_block: Array,
    num_blocks: Array,
) -> tuple[Array, tuple[Array, ...]]:
    products = partial(_products, _used(expert_of_block, num_blocks), expected)

    def finish(raw: Array) -> Sequence[Array]:
        kept = keep(act, raw).astype(x_QM.dtype)
        return kept, activate(act, kept.astype(jnp.float32))

    kept_and_h = products(x_QM, w_in_EMH, 1, finish, num_results=_num_kept(act))
    out_QM = products(kept_and_h[-1], w_out_EMH, 2)[0]
    return out_QM, (x_QM, kept_and_h[0], w_in_EMH, w_out_EMH, expert_of_block, num_blocks)


def _backward(act: Activation, expected: int, saved: tuple[Array, ...], dout_QM: Array) -> tuple:
    x_QM, kept_QH, w_in_EMH, w_out_EMH, *blocks = saved
    used = _used(*blocks)
    products = partial(_products, used, expected)

    def finish(dh: Array, kept: Array) -> Sequence[Array]:
        kept = kept.astype(jnp.float32)
        return slope(act, kept, dh), activate(act, kept)

    draw_and_h = products(dout_QM, w_out_EMH, 1, finish, kept_QH, num_results=_num_kept(act))
    draw_QH, h_QH = draw_and_h[0], kept_QH if act == "relu" else draw_and_h[1]
    dx_QM = products(draw_QH, w_in_EMH, 2)[0]
    sums = partial(_sums_over_rows, used, expected, w_in_EMH.shape[0])
    return dx_QM, sums(x_QM, draw_QH), sums(dout_QM, h_QH), None, None


on_blocks = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(0, 1))
on_blocks.defvjp(_forward, _backward)


def _num_kept(act: Activation) -> int:
    """Results of the width H: relu's is also what it keeps."""
    return 1 if act == "relu" else 2


def _used(expert_of_block: Array, num_blocks: Array) -> tuple[Array, Array]:
    """The blocks' experts, and how many of them to run: one if none is in use, whose rows are
    zeros, so that no grid is empty."""
    return expert_of_block, jnp.maximum(num_blocks, 1)


def _products(
    blocks: tuple[Array, Array],
    expected: int,
    x_QK: Array,
    w_EMH: Array,
    contracted: int,
    finish: Callable[..., Sequence[Array]] | None = None,
    *others: Array,
    num_results: int = 1,
) -> Sequence[Array]:
    """What `finish` makes of every block's product with its expert's weight, and of tiles of
    `others`, in the dtype of x.

    `contracted` is the dimension of the weight that is summed over. Without `finish` it is the
    product, and rows past the blocks in use are zeros; with it they are not written.
    """
    (expert_of_block, num_blocks), dtype = blocks, x_QK.dtype
    (Q, K), N = x_QK.shape, w_EMH.shape[3 - contracted]
    rows = Q // expert_of_block.shape[0]
    wide, narrow = _tile(N, WIDE_BYTES, dtype, 2), _tile(K, NARROW_BYTES, dtype)
    if expected > 3 * w_EMH.shape[0]:
        # 6 bytes moved for each weight, and then 2 less by every block of its expert.
        w_EMH = w_EMH.astype(dtype)

    if contracted == 1:
        w_spec = pl.BlockSpec((None, narrow, wide), lambda n, i, k, expert: (expert[i], k, n))
    else:
        w_spec = pl.BlockSpec((None, wide, narrow), lambda n, i, k, expert: (expert[i], n, k))
    result = pl.BlockSpec((rows, wide), lambda n, i, k, expert: (i, n))
    start = [] if finish else [jnp.zeros((Q, N), dtype)]
    moved = K * (N // wide) + N * (num_results + len(others))
    return pl.pallas_call(
        partial(_product, contracted - 1, finish, len(others), num_results),
        out_shape=[jax.ShapeDtypeStruct((Q, N), dtype)] * num_results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((rows, narrow), lambda n, i, k, expert: (i, k)),
                w_spec,
                *[result for _ in others],
                *[pl.BlockSpec(memory_space=pl.ANY) for _ in start],
            ],
            out_specs=[result] * num_results,
            grid=(N // wide, num_blocks, K // narrow),
            scratch_shapes=[pltpu.VMEM((rows, wide), jnp.float32)],
        ),
        input_output_aliases={3: 0} if start else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * rows * K * N,
            bytes_accessed=expected * (rows * moved * dtype.itemsize + K * N * w_EMH.itemsize),
            transcendentals=expected * rows * N * (num_results - 1),
        ),
        interpret=platform() == "cpu",
        name="experts_products",
    )(expert_of_block, x_QK, w_EMH, *others, *start)


def _product(
    contracted: int,
    finish: Callable[..., Sequence[Array]] | None,
    num_others: int,
    num_results: int,
    _: Any,
    x: Any,
    w: Any,
    *refs: Any,
) -> None:
    """One step of `_products`; `refs` are others, what results start from, results and the sum."""
    sum_ref, k, rows = refs[-1], pl.program_id(2), x.shape[0]

    @pl.when(k == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    dims = (((1,), (contracted,)), ((), ()))
    sum_ref[...] += jax.lax.dot_general(
        x[...], w[...].astype(x.dtype), dims, preferred_element_type=jnp.float32
    )

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        @pl.loop(0, rows, step=min(rows, STRIP_ROWS))
        def _(first: Any) -> None:
            strip = pl.ds(pl.multiple_of(first, 8), min(rows, STRIP_ROWS))
            made = (sum_ref[strip],)
            if finish is not None:
                made = finish(*made, *(ref[strip] for ref in refs[:num_others]))
            for ref, result in zip(refs[-1 - num_results : -1], made, strict=False):
                ref[strip] = result.astype(ref.dtype)


def _sums_over_rows(
    blocks: tuple[Array, Array], expected: int, num_experts: int, a_QM: Array, b_QH: Array
) -> Array:
    """The sums over each expert's rows of outer products, [E, M, H] in float32; zeros for experts
    without rows."""
    (expert_of_block, num_blocks), dtype = blocks, a_QM.dtype
    (Q, M), H = a_QM.shape, b_QH.shape[1]
    rows = Q // expert_of_block.shape[0]
    high, wide = _tile(M, NARROW_BYTES, dtype, 2), _tile(H, WIDE_BYTES, dtype)

    def kernel(expert: Any, a: Any, b: Any, _: Any, sum_ref: Any) -> None:
        i = pl.program_id(2)

        @pl.when((i == 0) | (expert[i] != expert[jnp.maximum(i - 1, 0)]))
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        dims = (((0,), (0,)), ((), ()))
        sum_ref[...] += jax.lax.dot_general(
            a[...], b[...], dims, preferred_element_type=jnp.float32
        )

    moved = M * (H // wide) + H * (M // high)
    shape = num_experts, M, H
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((rows, high), lambda m, h, i, expert: (i, m)),
                pl.BlockSpec((rows, wide), lambda m, h, i, expert: (i, h)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((None, high, wide), lambda m, h, i, expert: (expert[i], m, h)),
            grid=(M // high, H // wide, num_blocks),
        ),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * rows * M * H,
            bytes_accessed=expected * rows * moved * dtype.itemsize + 4 * num_experts * M * H,
            transcendentals=0,
        ),
        interpret=platform() == "cpu",
        name="experts_weight_gradients",
    )(expert_of_block, a_QM, b_QH, jnp.zeros(shape, jnp.float32))


def _tile(size: int, most_bytes: int, dtype: jnp.dtype, parts: int = 1) -> int:
    """The widest tile of whole lanes that divides the size, into so many parts at least where it
    can (v4 and v5p share a grid between two cores); the size itself if it has no whole lanes."""
    lanes = min(most_bytes // dtype.itemsize, size // parts) // TPU_LANES
    return next((n * TPU_LANES for n in range(lanes, 0, -1) if size % (n * TPU_LANES) == 0), size)
