"""Dispatch moves: tokens to the experts that `routing.py` chose, and their outputs back.

Three ways with one meaning. `einsum` is the paper's form, products with one-hot tensors over
[G, S, E, C], which compilers partition best; `gather` moves rows by index, with the same slots,
the same drops and the same results; `dropless` gives every expert as many rows as it was sent.
All take x_GSM, a route and `Experts`, the function that computes (`kernels/experts.py`); rows are
moved by index as in `kernels/rows.py`. A choice of weight 0 is not moved.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.config.nearest import divisors
from glamcli.model.kernels import rows
from glamcli.model.kernels.experts import Experts
from glamcli.model.routing import Route, queue_positions
from glamcli.parallel.axes import first_row, num_devices

TOKENS = ("group", None, "act_expert_embed")
"""How x_GSM is laid out."""
SLOTS = (None, "group", None, "act_expert_embed")
"""x_EGCM before it moves to the experts: every device has the slots of its own groups."""
BY_GROUP = ("group", None, None)
"""Arrays [G, S, ...] whose groups are split and nothing else."""
WEIGHTS = (("expert", None, "expert_mlp"),) * 2
"""w_in_EMH and w_out_EMH where they are multiplied: whole along M."""

ROUND_BYTES = 2**30
"""Memory on a device for one round's rows in `dropless`, if every token chose its experts."""


def einsum(x_GSM: Array, route: Route, slots: int, experts: Experts) -> Array:
    """Experts' weighted outputs by one-hot products (GShard, algorithm 2)."""
    layout = experts.layout
    with jax.named_scope("dispatch"):
        expert_GSKE = jax.nn.one_hot(route.expert_GSK, experts.num_experts, dtype=jnp.float32)
        slot_GSKC = jax.nn.one_hot(route.slot_GSK, slots, dtype=jnp.float32)
        combine_GSEC = jnp.einsum("GSK,GSKE,GSKC->GSEC", route.weight_GSK, expert_GSKE, slot_GSKC)
        combine_GSEC = layout.constrain(combine_GSEC.astype(x_GSM.dtype), "group", None, None, None)
        dispatch_GSEC = (combine_GSEC != 0).astype(x_GSM.dtype)
        x_EGCM = layout.constrain(jnp.einsum("GSEC,GSM->EGCM", dispatch_GSEC, x_GSM), *SLOTS)
    out_EGCM = layout.constrain(experts.on_slots(x_EGCM), *SLOTS)
    with jax.named_scope("combine"):
        return jnp.einsum("GSEC,EGCM->GSM", combine_GSEC, out_EGCM)


def gather(x_GSM: Array, route: Route, slots: int, experts: Experts) -> Array:
    """The same sums as `einsum`, moving rows by index: on each device the rows of its groups."""
    layout, E = experts.layout, experts.num_experts

    @jax.named_scope("dispatch")
    def collect(x_GSM: Array, weight_GSK: Array, expert_GSK: Array, slot_GSK: Array):
        G, S, M = x_GSM.shape
        group_G = jnp.arange(G, dtype=jnp.int32)[:, None, None]
        row_GSK = (expert_GSK * G + group_G) * slots + slot_GSK
        row_FK = jnp.where(weight_GSK > 0, row_GSK, E * G * slots).reshape(G * S, -1)
        choice_Q = rows.invert(row_FK, E * G * slots)
        x_QM = rows.collect(x_GSM.reshape(G * S, M), choice_Q, row_FK)
        return x_QM.reshape(E, G, slots, M), choice_Q, row_FK

    @jax.named_scope("combine")
    def combine(out_EGCM: Array, weight_GSK: Array, choice_Q: Array, row_FK: Array) -> Array:
        (G, S, K), M = weight_GSK.shape, out_EGCM.shape[-1]
        weight_FK = weight_GSK.reshape(G * S, K)
        return rows.combine(out_EGCM.reshape(-1, M), weight_FK, choice_Q, row_FK).reshape(G, S, M)

    tables = ("group",), ("group", None)
    collected = layout.on_each_device(
        collect, (TOKENS, BY_GROUP, BY_GROUP, BY_GROUP), (SLOTS, *tables)
    )
    weight_GSK = route.weight_GSK
    x_EGCM, *moves = collected(x_GSM, weight_GSK, route.expert_GSK, route.slot_GSK)
    combined = layout.on_each_device(combine, (SLOTS, BY_GROUP, *tables), TOKENS)
    return combined(experts.on_slots(x_EGCM), weight_GSK, *moves)


def dropless(x_GSM: Array, route: Route, experts: Experts) -> Array:
    """Experts' weighted outputs with no capacity; groups do not matter.

    Rows are laid out expert by expert, each starting at a multiple of a block, and the experts run
    the blocks in use. (On GPU and on v5e and v6e `jax.lax.ragged_dot` would be a dense product
    with every expert, as on CPU.)

    On a mesh no expert moves: each device gathers the tokens of all devices that share its
    experts, runs those that chose one of its own, and the partial sums are scattered back. That is
    more traffic than exchanging single rows; it needs no memory for the worst case of all rows
    meeting on one device, apart from one round's, and no shape that depends on the data.
    """
    if num_devices() == 1:
        choices = route.expert_GSK, route.weight_GSK
        return _on_this_device(x_GSM, *choices, experts, experts.num_experts)
    layout, mesh_shape = experts.layout, jax.sharding.get_abstract_mesh().shape
    tokens = layout.split_of("group", x_GSM.shape[0], mesh_shape)
    split = layout.split("expert") + layout.split("expert_mlp")
    shared = tuple(axis for axis in tokens if axis in split)
    alike = tuple(axis for axis in split if axis not in tokens)

    def run(x_GSM, expert_GSK, weight_GSK, w_in_EMH, w_out_EMH):
        own = experts._replace(w_in_EMH=w_in_EMH, w_out_EMH=w_out_EMH)
        first = first_row(layout.split("expert"), w_in_EMH)

        def one_round(part: list[Array]) -> Array:
            part = [jax.lax.all_gather(a, shared, tiled=True) for a in part] if shared else part
            x_GSM, expert_GSK, weight_GSK = part
            choices = expert_GSK - first, weight_GSK
            y_GSM = _on_this_device(x_GSM, *choices, own, experts.num_experts)
            y_GSM = y_GSM.astype(jnp.float32)
            if shared:  # first, which leaves less to sum over the other axes
                y_GSM = jax.lax.psum_scatter(y_GSM, shared, tiled=True)
            y_GSM = jax.lax.psum(y_GSM, alike) if alike else y_GSM
            return y_GSM.astype(x_GSM.dtype)

        (G, S, M), K, H = x_GSM.shape, expert_GSK.shape[-1], w_in_EMH.shape[-1]
        num_shares = math.prod(mesh_shape[axis] for axis in shared)
        needed = G * S * K * num_shares * (2 * M + H) * 4 / ROUND_BYTES
        rounds = next(n for n in divisors(G * S) if n >= needed)
        parts = [
            a.reshape(rounds, 1, G * S // rounds, a.shape[-1])
            for a in (x_GSM, expert_GSK, weight_GSK)
        ]
        if rounds == 1:
            return one_round([a[0] for a in parts]).reshape(G, S, M)
        return jax.lax.map(one_round, parts).reshape(G, S, M)

    on_mesh = layout.on_each_device(run, (BY_GROUP, BY_GROUP, BY_GROUP, *WEIGHTS), BY_GROUP)
    weights = experts.w_in_EMH, experts.w_out_EMH
    return on_mesh(x_GSM, route.expert_GSK, route.weight_GSK, *weights)


def _on_this_device(
    x_GSM: Array, expert_GSK: Array, weight_GSK: Array, experts: Experts, chosen_from: int
) -> Array:
    """`dropless` on one device, for choices of `experts`; other numbers are not moved. The router
    chose among so many experts, these included."""
    (G, S, M), K, E = x_GSM.shape, expert_GSK.shape[-1], experts.num_experts
    F = G * S
    expert_FK, weight_FK = expert_GSK.reshape(F, K), weight_GSK.reshape(F, K)
    moved_FK = (weight_FK > 0) & (expert_FK >= 0) & (expert_FK < E)
    with jax.named_scope("dispatch"):
        position_FK = queue_positions(expert_FK[None], moved_FK[None], E)[0]
        expert_E = jnp.arange(E, dtype=jnp.int32)
        sent_FKE = (expert_FK[..., None] == expert_E[None, None, :]) & moved_FK[..., None]
        num_rows_E = jnp.sum(sent_FKE, axis=(0, 1), dtype=jnp.int32)

        block = block_rows(F * K, E)
        num_blocks_E = -(-num_rows_E // block)
        end_E = jnp.cumsum(num_blocks_E)  # in blocks
        max_blocks = (F * K + min(E, F * K) * (block - 1)) // block
        start_FK = jnp.take((end_E - num_blocks_E) * block, expert_FK, axis=0)
        row_FK = jnp.where(moved_FK, start_FK + position_FK, max_blocks * block)
        choice_Q = rows.invert(row_FK, max_blocks * block)

        past = end_E[None, :] <= jnp.arange(max_blocks, dtype=jnp.int32)[:, None]
        expert_of_block = jnp.minimum(jnp.sum(past, axis=1, dtype=jnp.int32), E - 1)
        block_of_expert = jnp.arange(max_blocks, dtype=jnp.int32) - jnp.take(
            end_E - num_blocks_E, expert_of_block
        )
        used_of_block = jnp.clip(
            jnp.take(num_rows_E, expert_of_block) - block_of_expert * block, 0, block
        )
        x_QM = rows.collect(x_GSM.reshape(F, M), choice_Q, row_FK)
    balanced = math.ceil(F * K * E / chosen_from / block + E / 2)
    expected_blocks = min(balanced, max_blocks)
    out_QM = experts.on_blocks(x_QM, expert_of_block, used_of_block, end_E[-1], expected_blocks)
    with jax.named_scope("combine"):
        return rows.combine(out_QM, weight_FK, choice_Q, row_FK).reshape(G, S, M)


def block_rows(num_choices: int, num_experts: int) -> int:
    """Rows per block of `dropless`: a power of two near sqrt(80 x mean rows per expert), 8 to 512.

    Half a block per expert is padding, and every block reads its expert's weights, which costs
    about as much as 40 more rows: blocks of b rows cost (mean / b + 1/2)(b + 40) per expert.
    """
    best = (80 * num_choices / num_experts) ** 0.5
    block = 8
    while block < 512 and block * 2**0.5 < best:
        block *= 2
    return block
