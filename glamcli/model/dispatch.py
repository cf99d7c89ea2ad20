"""Dispatch moves: tokens to the experts that `routing.py` chose, and their outputs back.

Three ways with one meaning. `einsum` is the paper's form, products with one-hot tensors over
[G, S, E, C], which compilers partition best; `gather` moves rows by index, with the same slots,
the same drops and the same results; `dropless` gives every expert as many rows as it was sent.
All take x_GSM, a route, and the experts' float32 weights; the products themselves are in
`products.py`.

Two tables describe every move by index, with N = G x S tokens and P places: `choice_P`, the
choice (token x K + k) that sits in a place, N x K when empty; and `place_NK`, the place of each
choice, P when it is not moved. Each is the other's inverse, so both directions, and the
gradients of both, are reads by index: no scattered additions.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.model.kernels import products
from glamcli.model.kernels.products import Activation
from glamcli.model.routing import Route, queue_positions
from glamcli.parallel.axes import GLAM, Layout, first_row, num_devices

TOKENS = ("group", None, "act_expert_embed")
"""How x_GSM is laid out."""
SLOTS = (None, "group", None, "act_expert_embed")
"""x_EGCM before it moves to the experts: every device has the slots of its own groups."""
WEIGHTS = (("expert", None, "expert_mlp"),) * 2
"""w_in_EMH and w_out_EMH where they are multiplied: whole along M."""

ROUND_BYTES = 2**30
"""Room on a device for one round's rows in `dropless`, were every token to choose its experts."""


def einsum(
    x_GSM: Array,
    route: Route,
    slots: int,
    w_in_EMH: Array,
    w_out_EMH: Array,
    act: Activation,
    layout: Layout = GLAM,
) -> Array:
    """Experts' weighted outputs by one-hot products (GShard, algorithm 2)."""
    E = w_in_EMH.shape[0]
    expert_GSKE = jax.nn.one_hot(route.expert_GSK, E, dtype=jnp.float32)
    slot_GSKC = jax.nn.one_hot(route.slot_GSK, slots, dtype=jnp.float32)
    combine_GSEC = jnp.einsum("GSK,GSKE,GSKC->GSEC", route.weight_GSK, expert_GSKE, slot_GSKC)
    combine_GSEC = layout.constrain(combine_GSEC.astype(x_GSM.dtype), "group", None, None, None)
    # A dropped choice has weight 0, and no choice of weight 0 is dispatched.
    dispatch_GSEC = (combine_GSEC != 0).astype(x_GSM.dtype)
    x_EGCM = layout.constrain(jnp.einsum("GSEC,GSM->EGCM", dispatch_GSEC, x_GSM), *SLOTS)
    out_EGCM = products.slotted(x_EGCM, w_in_EMH, w_out_EMH, act, layout)
    out_EGCM = layout.constrain(out_EGCM, *SLOTS)
    return jnp.einsum("GSEC,EGCM->GSM", combine_GSEC, out_EGCM)


def gather(
    x_GSM: Array,
    route: Route,
    slots: int,
    w_in_EMH: Array,
    w_out_EMH: Array,
    act: Activation,
    layout: Layout = GLAM,
) -> Array:
    """The same sums as `einsum`, moving rows by index: on each device the rows of its groups."""
    E = w_in_EMH.shape[0]

    def collect(x_GSM: Array, weight_GSK: Array, expert_GSK: Array, slot_GSK: Array):
        G, S, M = x_GSM.shape
        group_G = jnp.arange(G, dtype=jnp.int32)[:, None, None]
        place_GSK = (expert_GSK * G + group_G) * slots + slot_GSK
        num_places = E * G * slots
        place_NK = jnp.where(weight_GSK > 0, place_GSK, num_places).reshape(G * S, -1)
        choice_P = _invert(place_NK, num_places)
        x_PM = _collect(x_GSM.reshape(G * S, M), choice_P, place_NK)
        return x_PM.reshape(E, G, slots, M), choice_P, place_NK

    def combine(out_EGCM: Array, weight_GSK: Array, choice_P: Array, place_NK: Array) -> Array:
        G, S, K = weight_GSK.shape
        M = out_EGCM.shape[-1]
        weight_NK = weight_GSK.reshape(G * S, K)
        y_NM = _combine(out_EGCM.reshape(-1, M), weight_NK, choice_P, place_NK)
        return y_NM.reshape(G, S, M)

    weight_GSK, by_group = route.weight_GSK, ("group", None, None)
    collected = layout.on_each_device(
        collect, (TOKENS, by_group, by_group, by_group), (SLOTS, ("group",), ("group", None))
    )
    x_EGCM, choice_P, place_NK = collected(x_GSM, weight_GSK, route.expert_GSK, route.slot_GSK)
    out_EGCM = products.slotted(x_EGCM, w_in_EMH, w_out_EMH, act, layout)
    combined = layout.on_each_device(
        combine, (SLOTS, by_group, ("group",), ("group", None)), TOKENS
    )
    return combined(out_EGCM, weight_GSK, choice_P, place_NK)


def dropless(
    x_GSM: Array,
    route: Route,
    w_in_EMH: Array,
    w_out_EMH: Array,
    act: Activation,
    layout: Layout = GLAM,
    *,
    by_blocks: bool,
) -> Array:
    """Experts' weighted outputs with no capacity; groups do not matter.

    Rows are laid out expert by expert. `by_blocks` starts each expert at a multiple of a block
    and loops over the blocks in use (CPU, where `jax.lax.ragged_dot` becomes a dense product
    with every expert); otherwise the rows are contiguous and `ragged_dot` multiplies them
    (GPU, TPU).

    On a mesh no expert moves: each device gathers the tokens of all devices that share its
    experts, runs those that chose one of its own, by blocks, and the partial sums are scattered
    back. That is more traffic than exchanging single rows; it needs no room for the worst case of
    all rows meeting on one device, apart from one round's, and no shape that depends on the data.
    """
    arrays = (x_GSM, route.expert_GSK, route.weight_GSK, route.kept_GSK, w_in_EMH, w_out_EMH)
    if num_devices() == 1:
        return _run_here(*arrays, act, by_blocks)
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    tokens = layout.split_of("group", x_GSM.shape[0], mesh_shape)
    experts, inside = layout.split("expert"), layout.split("expert_mlp")
    shared = tuple(axis for axis in tokens if axis in experts + inside)
    alike = tuple(axis for axis in experts + inside if axis not in tokens)
    by_group = ("group", None, None)

    def run(x_GSM, expert_GSK, weight_GSK, kept_GSK, w_in_EMH, w_out_EMH):
        E, _, H = w_in_EMH.shape
        first = first_row(experts, w_in_EMH)

        def one_round(part):
            part = [jax.lax.all_gather(a, shared, tiled=True) for a in part] if shared else part
            x_GSM, expert_GSK, weight_GSK, kept_GSK = part
            expert_GSK = expert_GSK - first
            kept_GSK &= (expert_GSK >= 0) & (expert_GSK < E)
            rows = (x_GSM, expert_GSK, weight_GSK, kept_GSK)
            y_GSM = _run_here(*rows, w_in_EMH, w_out_EMH, act, by_blocks=True).astype(jnp.float32)
            y_GSM = jax.lax.psum(y_GSM, alike) if alike else y_GSM
            if shared:
                y_GSM = jax.lax.psum_scatter(y_GSM, shared, tiled=True)
            return y_GSM.astype(x_GSM.dtype)

        (G, S, M), K = x_GSM.shape, expert_GSK.shape[-1]
        parts = math.prod(mesh_shape[axis] for axis in shared)
        rounds = _rounds(G * S, K * parts * (2 * M + H) * 4)
        tokens = (x_GSM, expert_GSK, weight_GSK, kept_GSK)
        split = [a.reshape(rounds, 1, G * S // rounds, a.shape[-1]) for a in tokens]
        if rounds == 1:
            return one_round([a[0] for a in split]).reshape(G, S, M)
        return jax.lax.map(one_round, split).reshape(G, S, M)

    whole = ("group", None, None)
    return layout.on_each_device(
        run,
        (whole, by_group, by_group, by_group, *WEIGHTS),
        whole,
    )(*arrays)


def _run_here(
    x_GSM: Array,
    expert_GSK: Array,
    weight_GSK: Array,
    kept_GSK: Array,
    w_in_EMH: Array,
    w_out_EMH: Array,
    act: Activation,
    by_blocks: bool,
) -> Array:
    """`dropless` on one device, for the choices that are kept."""
    G, S, M = x_GSM.shape
    E = w_in_EMH.shape[0]
    N, K = G * S, expert_GSK.shape[-1]
    expert_NK, weight_NK = expert_GSK.reshape(N, K), weight_GSK.reshape(N, K)
    moved_NK = kept_GSK.reshape(N, K) & (weight_NK > 0)
    position_NK = queue_positions(expert_NK[None], moved_NK[None], E)[0]
    expert_E = jnp.arange(E, dtype=jnp.int32)
    sent_NKE = (expert_NK[..., None] == expert_E[None, None, :]) & moved_NK[..., None]
    num_rows_E = jnp.sum(sent_NKE, axis=(0, 1), dtype=jnp.int32)

    block = block_rows(N * K, E) if by_blocks else 1
    num_blocks_E = -(-num_rows_E // block)
    end_E = jnp.cumsum(num_blocks_E)  # in blocks
    max_blocks = (N * K + min(E, N * K) * (block - 1)) // block
    num_places = max_blocks * block
    start_NK = jnp.take((end_E - num_blocks_E) * block, expert_NK, axis=0)
    place_NK = jnp.where(moved_NK, start_NK + position_NK, num_places)
    choice_P = _invert(place_NK, num_places)

    x_PM = _collect(x_GSM.reshape(N, M), choice_P, place_NK)
    if by_blocks:
        block_index = jnp.arange(max_blocks, dtype=jnp.int32)
        past = end_E[None, :] <= block_index[:, None]
        expert_of_block = jnp.minimum(jnp.sum(past, axis=1, dtype=jnp.int32), E - 1)
        out_PM = products.blocked(x_PM, w_in_EMH, w_out_EMH, expert_of_block, end_E[-1], act)
    else:
        out_PM = products.ragged(x_PM, w_in_EMH, w_out_EMH, num_rows_E, act)
    return _combine(out_PM, weight_NK, choice_P, place_NK).reshape(G, S, M)


def _rounds(num_tokens: int, token_bytes: int) -> int:
    """The fewest equal parts of the tokens whose rows stay below `ROUND_BYTES`."""
    needed = num_tokens * token_bytes / ROUND_BYTES
    return next(n for n in range(1, num_tokens + 1) if num_tokens % n == 0 and n >= needed)


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


def _invert(place_NK: Array, num_places: int) -> Array:
    """choice_P: which choice sits in each place."""
    choice_Q = jnp.arange(place_NK.size, dtype=jnp.int32)
    empty_P = jnp.full(num_places, place_NK.size, jnp.int32)
    return empty_P.at[place_NK.reshape(-1)].set(choice_Q, mode="drop")


@jax.custom_vjp
def _collect(x_NM: Array, choice_P: Array, place_NK: Array) -> Array:
    """The token of each place; zeros in empty ones."""
    return _rows(x_NM, choice_P // place_NK.shape[1])


def _collect_forward(x_NM: Array, choice_P: Array, place_NK: Array):
    return _collect(x_NM, choice_P, place_NK), place_NK


def _collect_backward(place_NK: Array, dx_PM: Array):
    dx_KNM = (_rows(dx_PM, place_N).astype(jnp.float32) for place_N in place_NK.T)
    return functools.reduce(jnp.add, dx_KNM).astype(dx_PM.dtype), None, None


_collect.defvjp(_collect_forward, _collect_backward)


@jax.custom_vjp
def _combine(out_PM: Array, weight_NK: Array, choice_P: Array, place_NK: Array) -> Array:
    """Each token's weighted sum over the places of its choices, summed in float32."""
    y_KNM = (
        _rows(out_PM, place_N).astype(jnp.float32) * weight_N[:, None]
        for place_N, weight_N in zip(place_NK.T, weight_NK.T, strict=True)
    )
    return functools.reduce(jnp.add, y_KNM).astype(out_PM.dtype)


def _combine_forward(out_PM: Array, weight_NK: Array, choice_P: Array, place_NK: Array):
    y_NM = _combine(out_PM, weight_NK, choice_P, place_NK)
    return y_NM, (out_PM, weight_NK, choice_P, place_NK)


def _combine_backward(saved: tuple[Array, Array, Array, Array], dy_NM: Array):
    out_PM, weight_NK, choice_P, place_NK = saved
    weight_P = jnp.take(weight_NK.reshape(-1), choice_P, mode="fill", fill_value=0)
    dy_PM = _rows(dy_NM, choice_P // place_NK.shape[1]).astype(jnp.float32)
    dout_PM = (dy_PM * weight_P[:, None]).astype(out_PM.dtype)
    dweight_KN = [
        jnp.sum(_rows(out_PM, place_N).astype(jnp.float32) * dy_NM.astype(jnp.float32), axis=1)
        for place_N in place_NK.T
    ]
    return dout_PM, jnp.stack(dweight_KN, axis=1), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _rows(x_NM: Array, index_P: Array) -> Array:
    """Rows by index; zeros for an index past the end."""
    return jnp.take(x_NM, index_P, axis=0, mode="fill", fill_value=0)
