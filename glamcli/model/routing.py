"""Routing decides: from router logits to experts, weights and slots of the experts.

Pure functions on float32 arrays; nothing here moves a token (`dispatch.py` does). The order of
steps is that of GShard (arXiv 2006.16668, algorithm 1) as its public implementation runs it:
first and second choice, normalise, then slots, all firsts before any second. Ties go to the
lowest expert index everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glamcli.config.schema import Moe


class Route(NamedTuple):
    """Where each token of each group goes: K choices, in order of preference."""

    expert_GSK: Array  # int32
    weight_GSK: Array  # float32; 0 where the choice was dropped or never wanted
    slot_GSK: Array  # int32, position in the expert's queue of that group; only valid where wanted
    wanted_GSK: Array  # bool; False for padding and for second choices the policy gave up
    kept_GSK: Array  # bool; wanted, and the queue had room


def decide(
    logits_GSE: Array, real_GS: Array, moe: Moe, slots: int | None, key: Array | None = None
) -> tuple[Route, Array]:
    """Returns the route and the router's probabilities [G, S, E].

    Args:
        logits_GSE: float32.
        real_GS: bool, False for padding, which is never routed and never takes a slot.
        slots: capacity C; None is dropless, every wanted choice is kept.
        key: randomness of `random` and `sampling`; None decides like policy `all`.
    """
    probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    expert_GSK, wanted_GSK, weight_GSK = _choose(logits_GSE, probs_GSE, moe, key)
    wanted_GSK &= real_GS[:, :, None]
    slot_GSK = queue_positions(expert_GSK, wanted_GSK, moe.num_experts)
    kept_GSK = wanted_GSK if slots is None else wanted_GSK & (slot_GSK < slots)
    if moe.experts_per_token > 1 and moe.normalize == "after_drop":
        weight_GSK = _share(logits_GSE, expert_GSK, kept_GSK)
    weight_GSK = jnp.where(kept_GSK, weight_GSK, 0.0)
    return Route(expert_GSK, weight_GSK, slot_GSK, wanted_GSK, kept_GSK), probs_GSE


def _choose(
    logits_GSE: Array, probs_GSE: Array, moe: Moe, key: Array | None
) -> tuple[Array, Array, Array]:
    """Experts, whether the policy wants them, and weights before capacity."""
    first_GS = jnp.argmax(probs_GSE, axis=-1).astype(jnp.int32)
    first_prob_GS = _pick(probs_GSE, first_GS)
    if moe.experts_per_token == 1:
        # Switch (arXiv 2101.03961): the raw probability is the weight.
        prob_GSK = first_prob_GS[:, :, None]
        return first_GS[:, :, None], jnp.ones(prob_GSK.shape, bool), prob_GSK

    expert_E = jnp.arange(moe.num_experts, dtype=jnp.int32)
    rest_GSE = probs_GSE
    if moe.second_policy == "sampling" and key is not None:
        # The largest of logits + Gumbel noise is a draw from their softmax.
        rest_GSE = logits_GSE + jax.random.gumbel(key, logits_GSE.shape, logits_GSE.dtype)
    is_first_GSE = first_GS[:, :, None] == expert_E[None, None, :]
    # Not 0 but -inf: probabilities underflow to 0, and the second must differ from the first.
    second_GS = jnp.argmax(jnp.where(is_first_GSE, -jnp.inf, rest_GSE), axis=-1).astype(jnp.int32)
    expert_GSK = jnp.stack([first_GS, second_GS], axis=-1)
    prob_GSK = jnp.stack([first_prob_GS, _pick(probs_GSE, second_GS)], axis=-1)
    # 1e-9 is GShard's; a first choice has at least 1/E, so it changes nothing here.
    weight_GSK = prob_GSK / (jnp.sum(prob_GSK, axis=-1, keepdims=True) + 1e-9)
    # A router sure of its first choice (the others underflow to 0) wants no second.
    wanted_GS = prob_GSK[:, :, 1] > 0
    if moe.second_policy == "random" and key is not None:
        draw_GS = jax.random.uniform(key, first_GS.shape, jnp.float32)
        gate_GSK = weight_GSK if moe.second_gate == "normalized" else prob_GSK
        wanted_GS &= draw_GS * moe.second_threshold < gate_GSK[:, :, 1]
    wanted_GSK = jnp.stack([jnp.ones_like(wanted_GS), wanted_GS], axis=-1)
    return expert_GSK, wanted_GSK, weight_GSK


def _pick(values_GSE: Array, expert_GS: Array) -> Array:
    """values[g, s, expert[g, s]], as a masked sum: its gradient needs no scatter."""
    expert_E = jnp.arange(values_GSE.shape[-1], dtype=jnp.int32)
    chosen_GSE = expert_GS[:, :, None] == expert_E[None, None, :]
    return jnp.sum(jnp.where(chosen_GSE, values_GSE, 0.0), axis=-1)


def _share(logits_GSE: Array, expert_GSK: Array, kept_GSK: Array) -> Array:
    """Each kept choice's share of the probability of its token's kept choices.

    A softmax of their logits, not a quotient: a lone survivor weighs 1, with gradient 0, however
    small its probability is.
    """
    each = [_pick(logits_GSE, expert_GS) for expert_GS in jnp.moveaxis(expert_GSK, -1, 0)]
    counted_GSK = kept_GSK | ~jnp.any(kept_GSK, axis=-1, keepdims=True)  # or 0 / 0
    return jax.nn.softmax(jnp.where(counted_GSK, jnp.stack(each, axis=-1), -jnp.inf), axis=-1)


def queue_positions(expert_GSK: Array, wanted_GSK: Array, num_experts: int) -> Array:
    """How many wanted choices of the same expert and group come before each one.

    First choices in token order, then second choices in token order. GShard starts seconds after
    the *kept* firsts; counting all firsts differs only once the firsts fill the queue, and then
    no second fits either way.

    Note: counts in blocks, by comparing and summing integers. A running sum over [Q, E] costs 3-8
    times as much on CPU, sorting needs a scatter to come back, and both split badly on TPU.
    """
    G, S, K = expert_GSK.shape
    block = 64
    num_blocks = -(-S * K // block)
    expert_Gc = jnp.where(wanted_GSK, expert_GSK, num_experts).swapaxes(1, 2).reshape(G, K * S)
    expert_Gc = jnp.pad(
        expert_Gc, ((0, 0), (0, num_blocks * block - K * S)), constant_values=num_experts
    )
    expert_Gnb = expert_Gc.reshape(G, num_blocks, block)
    index_b = jnp.arange(block, dtype=jnp.int32)
    earlier_bb = index_b[:, None] > index_b[None, :]
    same_Gnbb = (expert_Gnb[..., :, None] == expert_Gnb[..., None, :]) & earlier_bb[None, None]
    inside_Gnb = jnp.sum(same_Gnbb, axis=-1, dtype=jnp.int32)

    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    hit_GnbE = expert_Gnb[..., None] == expert_E[None, None, None, :]
    count_GnE = jnp.sum(hit_GnbE, axis=2, dtype=jnp.int32)
    before_GnE = jnp.cumsum(count_GnE, axis=1) - count_GnE
    outside_Gnb = jnp.sum(jnp.where(hit_GnbE, before_GnE[:, :, None, :], 0), axis=-1)

    position_Gc = (inside_Gnb + outside_Gnb).reshape(G, num_blocks * block)[:, : K * S]
    return position_Gc.reshape(G, K, S).swapaxes(1, 2)


def tally(
    route: Route, logits_GSE: Array, probs_GSE: Array, real_GS: Array, padding: str
) -> dict[str, Array]:
    """What a router did, as sums that add up over calls; `summary` makes means of them.

    `balance_sum` over groups (`balance_sums`), `groups` that count in it; over real tokens
    `router_z_sum` and `entropy_sum`, and `tokens`, their number; `wanted_K` and `kept_K` choices;
    per expert `wanted_E` choices before capacity, `kept_E` after it, and first choices `first_E`;
    `served_3` tokens that reached 0, 1, 2 experts. Only the losses carry a gradient.
    """
    expert_E = jnp.arange(probs_GSE.shape[-1], dtype=jnp.int32)
    chosen_GSKE = route.expert_GSK[..., None] == expert_E[None, None, None, :]
    num_served_GS = jnp.sum(route.kept_GSK, axis=-1, dtype=jnp.int32)
    served_GS3 = num_served_GS[:, :, None] == jnp.arange(3, dtype=jnp.int32)[None, None, :]
    entropy_GS = -jnp.sum(jax.scipy.special.xlogy(probs_GSE, probs_GSE), axis=-1)
    balance_sum, groups = balance_sums(probs_GSE, route.expert_GSK[:, :, 0], real_GS, padding)
    return {
        "balance_sum": balance_sum,
        "groups": groups,
        "router_z_sum": router_z_sum(logits_GSE, real_GS),
        "entropy_sum": jax.lax.stop_gradient(jnp.sum(jnp.where(real_GS, entropy_GS, 0.0))),
        "tokens": _count(real_GS, axis=(0, 1)),
        "wanted_K": _count(route.wanted_GSK, axis=(0, 1)),
        "kept_K": _count(route.kept_GSK, axis=(0, 1)),
        "wanted_E": _count(chosen_GSKE & route.wanted_GSK[..., None], axis=(0, 1, 2)),
        "kept_E": _count(chosen_GSKE & route.kept_GSK[..., None], axis=(0, 1, 2)),
        "first_E": _count(chosen_GSKE[:, :, 0] & real_GS[:, :, None], axis=(0, 1)),
        "served_3": _count(served_GS3 & real_GS[:, :, None], axis=(0, 1)),
    }


def dropped_of(route: Route, slots_F: Sequence[int]) -> Array:
    """How many wanted choices each of these capacities would drop, int32 [F]: queues are counted
    before capacity cuts them."""
    late_GSKF = route.slot_GSK[..., None] >= jnp.asarray(slots_F, jnp.int32)[None, None, None, :]
    return _count(late_GSKF & route.wanted_GSK[..., None], axis=(0, 1, 2))


def balance_sums(
    probs_GSE: Array, first_GS: Array, real_GS: Array, padding: str
) -> tuple[Array, Array]:
    """E x sum of f P, summed over groups, and the number of groups in it; the loss is their
    quotient, 1 when uniform (GLaM section 4, GShard section 2.2).

    f is the share of tokens whose first choice is the expert, before capacity; P the mean
    probability. `legacy` leaves padding in both denominators, so padding lowers the loss;
    `corrected` counts real tokens only, and groups without any not at all.
    """
    G, S, E = probs_GSE.shape
    expert_E = jnp.arange(E, dtype=jnp.int32)
    chosen_GSE = (first_GS[:, :, None] == expert_E[None, None, :]) & real_GS[:, :, None]
    f_GE = jnp.sum(chosen_GSE, axis=1, dtype=jnp.int32).astype(jnp.float32) / S
    p_GE = jnp.sum(jnp.where(real_GS[:, :, None], probs_GSE, 0.0), axis=1) / S
    loss_G = E * jnp.sum(f_GE * p_GE, axis=-1)
    if padding == "legacy":
        return jnp.sum(loss_G), jnp.asarray(G, jnp.int32)
    real_G = jnp.mean(real_GS.astype(jnp.float32), axis=1)
    return jnp.sum(loss_G / (real_G + 1e-6) ** 2), _count(real_G > 0, axis=(0,))


def router_z_sum(logits_GSE: Array, real_GS: Array) -> Array:
    """Sum over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)."""
    square_GS = jax.nn.logsumexp(logits_GSE, axis=-1) ** 2
    return jnp.sum(jnp.where(real_GS, square_GS, 0.0))


def summary(sums: dict[str, Array]) -> dict[str, Array]:
    """Both router losses, without coefficients, and diagnostics, all float32, from tallies.

    Leading dimensions (layers) stay. Per expert `wanted_E`, its share of choices before capacity,
    and `first_E`, of first choices; `dropped_*_frac` choices turned away for lack of room, of those
    wanted; `served_3` share of real tokens that reached 0, 1, 2 experts; `dead_experts` experts
    that no token reached. Of `dropped_F` (`dropped_of`), where it is among the tallies, shares.
    """
    tokens, wanted_K = sums["tokens"], sums["wanted_K"]
    wanted_E = sums["wanted_E"]
    dropped_K, wanted = wanted_K - sums["kept_K"], jnp.sum(wanted_K, axis=-1)
    has_second = wanted_K.shape[-1] > 1
    second_frac = _over(dropped_K[..., -1], wanted_K[..., -1])
    dropped_F = sums.get("dropped_F")
    of_capacities = {} if dropped_F is None else {"dropped_F": _over(dropped_F, wanted[..., None])}
    return of_capacities | {
        "balance_loss": _over(sums["balance_sum"], sums["groups"]),
        "router_z_loss": _over(sums["router_z_sum"], tokens),
        "wanted_E": _over(wanted_E, jnp.sum(wanted_E, axis=-1, keepdims=True)),
        "first_E": _over(sums["first_E"], tokens[..., None]),
        "dropped_first_frac": _over(dropped_K[..., 0], wanted_K[..., 0]),
        "dropped_second_frac": second_frac if has_second else jnp.zeros_like(second_frac),
        "dropped_frac": _over(jnp.sum(dropped_K, axis=-1), wanted),
        "served_3": _over(sums["served_3"], tokens[..., None]),
        "router_entropy_nats": _over(sums["entropy_sum"], tokens),
        "dead_experts": jnp.sum(sums["kept_E"] == 0, axis=-1, dtype=jnp.int32).astype(jnp.float32),
    }


def _count(mask: Array, axis: tuple[int, ...]) -> Array:
    # Integers: float32 stops counting at 2^24, and a batch may hold more.
    return jnp.sum(mask, axis=axis, dtype=jnp.int32)


def _over(part: Array, total: Array) -> Array:
    return part.astype(jnp.float32) / jnp.maximum(total.astype(jnp.float32), 1.0)
