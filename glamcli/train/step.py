"""One optimizer step and one held-out step, as pure functions of their arguments.

Nothing here is jitted or placed: the loop and the planner compile the same functions. What they
return are sums over targets; means are taken last, by `metrics.py`.

The loss of a batch, with the recipe's denominator (targets or positions), is

    sum(nats + z_coef x logsumexp^2) / denominator
    + balance_coef x balance loss + router_z_coef x router z-loss

where each router loss is summed or averaged over expert layers (`moe.balance_over_layers`).

A batch may be split into parts to save memory (`batch.accumulate`). Every share of a part in the
whole (its targets, routing groups, tokens) is counted before the first part runs, so the parts'
gradients simply add up to the gradient of the whole, padding or not. `random` and `sampling`
second choices are drawn per part, so the split changes those draws.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glamcli import faults
from glamcli.config.schema import Loss, Moe, Recipe
from glamcli.config.stages import schedule
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout, Tree
from glamcli.train.guard import judge
from glamcli.train.optimizer import checked_update, global_norm, learning_rate, parameter_norm
from glamcli.train.state import State

Sums = dict[str, Any]
_Batch = Mapping[str, Array]

ROUTER_STREAM = 1
"""Keeps the routers' draws apart from the initial weights, which use the bare seed."""


def make_train_step(
    decoder: Decoder, recipe: Recipe, num_sources: int, restarts: tuple[int, ...] = ()
) -> Callable[[State, _Batch], tuple[State, Sums]]:
    """The function (state, batch) -> (next state, sums).

    `batch` holds `tokens`, `targets`, `segments` [B, S] and `source` [B], all int32; padding has
    segment 0. A NaN or Inf in loss, gradient, update or optimizer state changes neither weights nor
    state, and nor does a spike (`guard.py`); a gradient norm that overflows float32 counts as Inf.
    `restarts` are the steps after which the mixture's weights change.
    """

    def train_step(state: State, batch: _Batch) -> tuple[State, Sums]:
        grads, sums = gradient(decoder, recipe, num_sources, state, batch)
        loss = sums["loss_nats"] / jnp.maximum(sums["num_targets"], 1).astype(jnp.float32)
        after, numbers = update(decoder, recipe, state, grads, loss, restarts)
        return after, sums | numbers

    return train_step


def make_heldout_step(
    decoder: Decoder, recipe: Recipe, num_sources: int
) -> Callable[[Tree, _Batch], Sums]:
    """The function (params, batch) -> sums of the loss, routed as for evaluation."""

    def heldout_step(params: Tree, batch: _Batch) -> Sums:
        x_BSM, _ = decoder.hidden(
            params,
            batch["tokens"],
            batch["segments"],
            dispatch=decoder.eval_dispatch,
            schedule=schedule(recipe),
        )
        nats_BS, logz_BS = decoder.losses(params, x_BSM, batch["targets"])
        return _loss_sums(nats_BS, logz_BS, batch, num_sources)

    return heldout_step


def update(
    decoder: Decoder,
    recipe: Recipe,
    state: State,
    grads: Tree,
    loss: Array,
    restarts: tuple[int, ...] = (),
) -> tuple[State, Sums]:
    """The state after this gradient, and numbers of the step for the metrics.

    Where the gradient or the update is not finite (a finite gradient gives such an update when the
    optimizer's own arithmetic overflows) or the step is a spike, with `loss` in nats per target,
    weights and optimizer state keep every bit and the step is counted as bad. The reference code
    zeroes a bad gradient but lets the optimizer's averages decay; GLaM section 5 skips the update
    (see also paxml). `step` advances either way, so that a bad batch is not met again.
    """
    with jax.named_scope("optimizer"):
        grad_norm = global_norm(grads)
        updates, opt_state, finite, update_norm = checked_update(
            recipe.optimizer, decoder.axes, grads, state.opt_state, state.params
        )
        finite &= jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & jnp.isfinite(loss)
        rate = learning_rate(recipe.optimizer, state.opt_state["count"] + 1)
        norms = (grad_norm, update_norm)
        verdict = judge(recipe, restarts, state.window, state.step + 1, loss, *norms, rate)
        good = finite & ~verdict.is_spike
        params = jax.tree.map(jnp.add, state.params, updates)
        # A choice per element, not a branch: it fuses with the addition of the update, so a good
        # step pays nothing (measured), and it is the same program on every device.
        params, opt_state, window = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, verdict.window),
            (state.params, state.opt_state, state.window),
        )
        bad = jnp.logical_not(good).astype(jnp.int32)
        bad_steps, total = (state.bad_steps + 1) * bad, state.bad_steps_total + bad
        after = State(state.step + 1, params, opt_state, bad_steps, total, window)
    return after, {
        "step": after.step,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": parameter_norm(state.params, decoder.axes),
        "finite": finite,
        "spike": finite & verdict.is_spike,
        "deviations": verdict.deviations,
        "typical": verdict.typical,
        "bad_steps": after.bad_steps,
        "bad_steps_total": after.bad_steps_total,
    }


def gradient(
    decoder: Decoder, recipe: Recipe, num_sources: int, state: State, batch: _Batch
) -> tuple[Tree, Sums]:
    """Gradient of the whole batch's loss, and its sums, part by part."""
    num_parts = recipe.batch.accumulate
    key = _router_key(recipe, state.step)
    parts = {name: _split(x, num_parts, decoder.layout) for name, x in batch.items()}
    parts |= {"part": jnp.arange(num_parts, dtype=jnp.int32), **_shares(parts, recipe)}

    def part_gradient(part: _Batch) -> tuple[Tree, Sums]:
        part_key = None if key is None else jax.random.fold_in(key, part["part"])

        def objective(params: Tree) -> tuple[Array, Sums]:
            x_BSM, stats = decoder.hidden(
                params, part["tokens"], part["segments"], key=part_key, schedule=schedule(recipe)
            )
            nats_BS, logz_BS = decoder.losses(params, x_BSM, part["targets"])
            if faults.LOSS_FACTOR in part:
                nats_BS *= part[faults.LOSS_FACTOR][:, None]
            sums = _loss_sums(nats_BS, logz_BS, part, num_sources)
            loss = _loss(sums, stats, part, recipe.loss, recipe.moe)
            # Times the part's share, so that parts add up to means over the batch.
            routing = {
                name: x * part["group_share" if name == "balance_loss" else "token_share"]
                for name, x in stats.items()
            }
            return loss, sums | {"loss": loss, "routing": routing}

        return jax.grad(objective, has_aux=True)(state.params)

    if num_parts == 1:
        return part_gradient({name: x[0] for name, x in parts.items()})

    def add(total: Tree, part: _Batch) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, part_gradient(part)), None

    first = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in parts.items()}
    shapes = jax.eval_shape(part_gradient, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    with jax.named_scope("accumulate"):
        return jax.lax.scan(add, zeros, parts)[0]


def _split(x: Array, num_parts: int, layout: Layout) -> Array:
    """[B, ...] -> [A, B / A, ...], the rows of a part contiguous: a routing group may span rows,
    and then has the same ones as without parts."""
    split = x.reshape(num_parts, x.shape[0] // num_parts, *x.shape[1:])
    return layout.constrain(split, None, "batch", *(None,) * (x.ndim - 1))


def _shares(parts: _Batch, recipe: Recipe) -> dict[str, Array]:
    """The weight of each part in the whole batch, [A] each.

    `per_target` is 1 / denominator; the mean over routing groups becomes a sum of the parts'
    means times `group_share`, the mean over tokens of those times `token_share`.
    """
    real_ABS = parts["segments"] != 0
    num_parts = real_ABS.shape[0]
    tokens_A = jnp.sum(real_ABS, axis=(1, 2), dtype=jnp.int32)
    num_targets = jnp.maximum(jnp.sum(tokens_A), 1)
    if recipe.loss.denominator == "positions":
        num_targets = jnp.asarray(real_ABS.size, jnp.int32)
    shares = {
        "per_target": jnp.full(num_parts, 1.0, jnp.float32) / num_targets.astype(jnp.float32),
        "token_share": _share(tokens_A),
    }
    if recipe.moe is None:
        return shares
    if recipe.moe.balance_padding == "legacy":
        group_share = jnp.full(num_parts, 1.0 / num_parts, jnp.float32)
    else:
        real_AGS = real_ABS.reshape(num_parts, -1, recipe.moe.group_tokens)
        group_share = _share(jnp.sum(jnp.any(real_AGS, axis=2), axis=1, dtype=jnp.int32))
    return shares | {"group_share": group_share}


def _share(count_A: Array) -> Array:
    count_A = count_A.astype(jnp.float32)
    return count_A / jnp.maximum(jnp.sum(count_A), 1.0)


@jax.named_scope("loss")
def _loss_sums(nats_BS: Array, logz_BS: Array, batch: _Batch, num_sources: int) -> Sums:
    """Sums over real targets, of all and by source."""
    real_BS = batch["segments"] != 0
    nats_B = jnp.sum(jnp.where(real_BS, nats_BS, 0.0), axis=1)
    num_B = jnp.sum(real_BS, axis=1, dtype=jnp.int32)
    source = jnp.arange(num_sources, dtype=jnp.int32)
    is_source = batch["source"][:, None] == source[None, :]
    return {
        "loss_nats": jnp.sum(nats_B),
        "z_sum": jnp.sum(jnp.where(real_BS, jnp.square(logz_BS), 0.0)),
        "num_targets": jnp.sum(num_B),
        "source_nats": jnp.sum(jnp.where(is_source, nats_B[:, None], 0.0), axis=0),
        "source_targets": jnp.sum(jnp.where(is_source, num_B[:, None], 0), axis=0),
    }


@jax.named_scope("loss")
def _loss(sums: Sums, stats: Sums, part: _Batch, loss: Loss, moe: Moe | None) -> Array:
    """A part's share of the loss that the module docstring states."""
    total = (sums["loss_nats"] + loss.z_coef * sums["z_sum"]) * part["per_target"]
    if moe is None:
        return total
    over_layers = jnp.sum if moe.balance_over_layers == "sum" else jnp.mean
    balance = over_layers(stats["balance_loss"]) * part["group_share"]
    total = total + moe.balance_coef * balance
    if moe.router_z_coef:
        router_z = over_layers(stats["router_z_loss"]) * part["token_share"]
        total = total + moe.router_z_coef * router_z
    return total


def _router_key(recipe: Recipe, step: Array) -> Array | None:
    """Randomness of this step's second choices: a function of seed and step, so a resumed run
    draws the same ones without saving anything."""
    if recipe.moe is None or recipe.moe.second_policy == "all":
        return None
    stream = jax.random.fold_in(jax.random.key(recipe.seed), ROUTER_STREAM)
    return jax.random.fold_in(stream, step)
