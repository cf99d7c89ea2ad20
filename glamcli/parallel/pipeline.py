"""Blocks of layers as stages of a pipeline, all in one program (GSPMD, arXiv 2105.04663, 3.3).

Every array has a leading dimension of stages, split over the mesh axis of `layers`. Each tick runs
all stages at once, each on its own microbatch, and moves what comes out to the next stage. Why
microbatches go through in turns of as many as there are stages, and why every data shard has a copy
of its stage's weights: docs/decisions/0007.

While the pipeline fills and empties, stages run on rows without meaning. Nothing of that is kept:
measurements are masked, and no result, so no gradient, depends on it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.config.stages import PipelineSchedule
from glamcli.parallel.axes import Axes, Layout, Tree, dividing

BlockFn = Callable[[Layout, Array, Array, Tree, Array, Array], tuple[Array, Tree]]
"""(layout, x, segments, parameters, number of the block, a number that no other rows of the step
have) -> (x, measured)."""
COPY_GRADIENTS = 8
"""Bytes that a copied weight's gradients take: one tick's and their sum, float32."""

STREAM = ("layers", None, "batch", "seq", "act_embed")
MOVING = ("layers", "batch", "seq", "act_embed")


def run_stages(
    schedule: PipelineSchedule,
    layout: Layout,
    block: BlockFn,
    blocks: Tree,
    axes: Tree,
    x_BSM: Array,
    segments_BS: Array,
    group_rows: int,
    remat: Callable[[Callable], Callable],
    unroll: bool,
) -> tuple[Array, Tree]:
    """The rows [B, S, M] after all blocks, and what each block measured [blocks, ...], summed over
    the microbatches.

    Args:
        blocks: parameters, stacked over blocks; `axes` are their logical axes.
        group_rows: rows that belong together in routing, and so in one microbatch.
        remat: makes of a block what the backward pass computes it from.
    """
    order = _order(layout, schedule, x_BSM.shape[0], group_rows)
    stream = layout.constrain(_split(x_BSM, *order), *STREAM)
    segments_UBS = _split(segments_BS, *order)
    segments_UBS = segments_UBS.reshape(schedule.microbatches, -1, segments_BS.shape[1])
    segments_UBS = layout.constrain(segments_UBS, None, "batch", None)
    # The mesh axes over which weights have copies, as far as a microbatch has that many parts.
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    shards = dividing(layout.data_axes, order[0], mesh_shape)
    weights = jax.tree.map(
        partial(_copies, schedule, layout, shards), blocks, axes, is_leaf=lambda leaf: leaf is None
    )
    all_stages = _all_stages(schedule, layout, shards, block, segments_UBS, remat, unroll)
    exchange = partial(_exchange, schedule, layout)

    def advance(carry: Any, tick: Array) -> tuple[Any, None]:
        x_PBSM, queue, stream, total = carry
        out_PBSM, measured = all_stages(weights, tick, x_PBSM)
        moved = exchange(tick + 1, _shift(layout, out_PBSM, 1), queue, stream)
        return (*moved, jax.tree.map(jnp.add, total, measured)), None

    nothing = layout.constrain(jnp.zeros_like(stream[:, 0]), *MOVING)
    first = exchange(jnp.zeros((), jnp.int32), nothing, nothing, stream)
    shapes = jax.eval_shape(all_stages, weights, jnp.zeros((), jnp.int32), first[0])[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ticks = jnp.arange(schedule.ticks, dtype=jnp.int32)
    with jax.named_scope("pipeline"):
        (_, _, stream, total_PZI), _ = jax.lax.scan(advance, (*first, zeros), ticks)
    x_BSM = layout.constrain(_join(stream, *order), "outer_batch", "seq", "act_embed")

    def by_block(total_PZI: Array) -> Array:
        return jnp.swapaxes(jnp.sum(total_PZI, axis=1), 0, 1).reshape(-1, *total_PZI.shape[4:])

    return x_BSM, jax.tree.map(by_block, total_PZI)


def _all_stages(
    schedule: PipelineSchedule,
    layout: Layout,
    shards: tuple[str, ...],
    block: BlockFn,
    segments_UBS: Array,
    remat: Callable[[Callable], Callable],
    unroll: bool,
) -> Callable[[Tree, Array, Array], tuple[Array, Tree]]:
    """(weights [P, Z, ...], tick, x_PBSM) -> (x_PBSM, what the blocks measured [P, Z, I, L, ...]):
    one tick of all stages, every data shard by itself."""
    P, U, I = schedule.stages, schedule.microbatches, schedule.repeats
    inner = layout.without(shards)
    segments_UZBS = _by_shard(segments_UBS, shards)

    def shard(
        params: Tree, number: Array, part: Array, tick: Array, segments_UBS: Array, x_BSM: Array
    ) -> tuple[Array, Tree]:
        """One stage's blocks over one data shard of the microbatch that it has at this tick."""
        turn, inside = jnp.divmod(tick - number, I * P)
        repeat, entry = jnp.divmod(inside, P)
        microbatch = entry * (U // P) + turn
        segments_BS = jax.lax.dynamic_index_in_dim(segments_UBS, microbatch, keepdims=False)
        rows = part * U + microbatch

        def one(x_BSM: Array, layer: tuple[Tree, Array]) -> tuple[Array, Tree]:
            params, k = layer
            if I > 1:  # here, so that no tick keeps its choice of weights for the backward pass
                pick = partial(jax.lax.dynamic_index_in_dim, index=repeat, keepdims=False)
                params = jax.tree.map(pick, params)
            return block(inner, x_BSM, segments_BS, params, (repeat * P + number) * L + k, rows)

        L = jax.tree.leaves(params)[0].shape[0]
        parts = (params, jnp.arange(L, dtype=jnp.int32))
        x_BSM, measured = jax.lax.scan(remat(one), x_BSM, parts, unroll=unroll)
        valid = (turn >= 0) & (turn < U // P)
        here_I = (jnp.arange(I, dtype=jnp.int32) == repeat) & valid

        def by_repeat(x_L: Array) -> Array:  # [I, L, ...], zeros but for this repeat
            here = here_I.reshape(-1, *(1,) * x_L.ndim)
            return jnp.where(here, x_L[None], jnp.zeros((), x_L.dtype))

        return x_BSM, jax.tree.map(by_repeat, measured)

    stage = jax.vmap(shard, in_axes=(0, None, 0, None, 1, 0), spmd_axis_name=shards)
    stages = jax.vmap(
        stage, in_axes=(0, 0, None, None, None, 0), spmd_axis_name=layout.split("layers")
    )

    def tick_of_all(weights: Tree, tick: Array, x_PBSM: Array) -> tuple[Array, Tree]:
        x_PZBSM = _by_shard(x_PBSM, shards)
        numbers = (jnp.arange(P, dtype=jnp.int32), jnp.arange(x_PZBSM.shape[1], dtype=jnp.int32))
        out_PZBSM, measured = stages(weights, *numbers, tick, segments_UZBS, x_PZBSM)
        return layout.constrain(out_PZBSM.reshape(x_PBSM.shape), *MOVING), measured

    return tick_of_all


def _exchange(
    schedule: PipelineSchedule,
    layout: Layout,
    tick: Array,
    ring: Array,
    queue: Array,
    stream: Array,
) -> tuple[Array, Array, Array]:
    """What the stages get at this tick, the queue and the stream after it.

    On the first P ticks of a turn, stage 0 takes the next microbatch out of the queue and leaves
    there what has just come out of the last stage.
    """
    P, U, I = schedule.stages, schedule.microbatches, schedule.repeats
    turn, inside = jnp.divmod(tick, I * P)
    next_turn = jnp.minimum(turn, U // P - 1)
    fresh = jax.lax.dynamic_index_in_dim(stream, next_turn, axis=1, keepdims=False)
    queue = jnp.where(inside == 0, fresh, queue)
    enters = ((jnp.arange(P, dtype=jnp.int32) == 0) & (inside < P))[:, None, None, None]
    x_PBSM = jnp.where(enters, queue, ring)
    queue = _shift(layout, jnp.where(enters, ring, queue), -1)
    # The last write of a turn, in which all its results are, is the one that stays.
    done = jnp.maximum(turn - 1, 0)
    stream = jax.lax.dynamic_update_index_in_dim(stream, queue, done, axis=1)
    return layout.constrain(x_PBSM, *MOVING), queue, layout.constrain(stream, *STREAM)


def _order(
    layout: Layout, schedule: PipelineSchedule, num_rows: int, group_rows: int
) -> tuple[int, int, int]:
    """How rows are numbered: [parts, stages, microbatches per stage, rows].

    Every microbatch takes neighbouring rows from each data shard, so that rows stay on their
    devices; from fewer, larger parts where a routing group has more rows than that.
    """
    shards = layout.num_parts((num_rows,), ("batch",))
    parts = math.gcd(shards, num_rows // schedule.microbatches // group_rows)
    return parts, schedule.stages, schedule.microbatches // schedule.stages


def _by_shard(x_PBS: Array, shards: tuple[str, ...]) -> Array:
    """[P, Z B, ...] -> [P, Z, B, ...]: rows by data shard."""
    return x_PBS.reshape(x_PBS.shape[0], _num_copies(shards), -1, *x_PBS.shape[2:])


def _num_copies(shards: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in shards)


def _copies(
    schedule: PipelineSchedule, layout: Layout, shards: tuple[str, ...], w_L: Array, axes: Axes
) -> Array:
    """A parameter stacked over blocks by stage (`_by_stage`), a copy for every data shard: [P, Z,
    blocks of a stage and repeat L, (I,) ...]. Its gradient is their sum."""
    w_PL = _by_stage(schedule, layout, w_L, axes)
    within = (None,) * (w_PL.ndim - len(axes)) + axes[1:]

    def laid_out(w_L: Array) -> Array:
        return layout.without(shards).constrain(w_L, *within)

    by_shard = jax.vmap(laid_out, spmd_axis_name=shards)
    by_stage = jax.vmap(by_shard, spmd_axis_name=layout.split("layers"))
    copies = (w_PL.shape[0], _num_copies(shards), *w_PL.shape[1:])
    return by_stage(jnp.broadcast_to(w_PL[:, None], copies))


def _split(x_BS: Array, shards: int, stages: int, each: int) -> Array:
    """[B, ...] -> [stages, microbatches per stage, rows of a microbatch, ...]."""
    rows = x_BS.reshape(shards, stages, each, -1, *x_BS.shape[1:])
    return jnp.moveaxis(rows, 0, 2).reshape(stages, each, -1, *x_BS.shape[1:])


def _join(stream: Array, shards: int, stages: int, each: int) -> Array:
    """The rows [B, ...] of `_split`, in their order."""
    rows = stream.reshape(stages, each, shards, -1, *stream.shape[3:])
    return jnp.moveaxis(rows, 2, 0).reshape(-1, *stream.shape[3:])


def _shift(layout: Layout, x_PBSM: Array, by: int) -> Array:
    """Every stage's rows, on the stage that is `by` further on in the ring."""
    (axis,) = layout.split("layers")

    def send(x_PBSM: Array) -> Array:
        size = jax.lax.axis_size(axis)
        return jax.lax.ppermute(x_PBSM, axis, [(p, (p + by) % size) for p in range(size)])

    return layout.on_each_device(send, (MOVING,), MOVING)(x_PBSM)


def _by_stage(schedule: PipelineSchedule, layout: Layout, w_L: Array, axes: Axes) -> Array:
    """A parameter stacked over blocks, [P, blocks of a stage and repeat L, (I,) ...].

    In repeat r, stage p runs the blocks (r P + p) L to (r P + p + 1) L, but it keeps I L blocks in
    a row, whatever the schedule, so that checkpoints know nothing of it. With one repeat those are
    the same. With more, weights move to their stages once per step, and gradients back: I
    permutations of what a device has.
    """
    P, I = schedule.stages, schedule.repeats
    L = w_L.shape[0] // (P * I)
    stacked = ("layers", None, *axes[1:])
    if I == 1:
        return layout.constrain(w_L.reshape(P, L, *w_L.shape[1:]), *stacked)
    (axis,) = layout.split("layers")
    send_PI, to_PI, repeat_PI = _moves(P, I)

    def move(w_L: Array) -> Array:
        here = jax.lax.axis_index(axis)
        chunks = w_L.reshape(I, L, *w_L.shape[1:])
        moved = jnp.zeros_like(chunks)
        for j in range(I):
            chunk = jnp.take(chunks, jnp.asarray(send_PI)[here, j], axis=0)
            pairs = [(p, int(to_PI[p, j])) for p in range(P)]
            if any(sender != receiver for sender, receiver in pairs):
                chunk = jax.lax.ppermute(chunk, axis, pairs)
            moved = moved.at[jnp.asarray(repeat_PI)[here, j]].set(chunk)
        return jnp.moveaxis(moved, 0, 1)[None]

    moved_axes = ("layers", None, None, *axes[1:])
    return layout.on_each_device(move, (axes,), moved_axes)(w_L)


def _moves(P: int, I: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """I rounds in which every stage sends one of its I chunks and receives one, int32 [P, I] each:
    which chunk it sends, to which stage, and as which repeat the receiver runs what it gets.

    Chunk c = p I + s of stage p belongs to stage c mod P. In round j stage p sends
    s = (j + p // (P / g)) mod I with g = gcd(P, I), and then no two send to the same stage: those
    with equal p I mod P differ in s modulo g, which divides all p I mod P.
    """
    p_P1, j_1I = np.arange(P)[:, None], np.arange(I)[None, :]
    send_PI = (j_1I + p_P1 // (P // math.gcd(P, I))) % I
    chunk_PI = p_P1 * I + send_PI
    to_PI = chunk_PI % P
    repeat_PI = np.empty_like(to_PI)
    np.put_along_axis(repeat_PI, to_PI, chunk_PI // P, axis=0)
    return send_PI.astype(np.int32), to_PI, repeat_PI.astype(np.int32)
