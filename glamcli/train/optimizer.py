"""Adafactor and AdamW by axis names, and the learning rate (GLaM section 5).

Parameters of all layers are stacked on a leading `layers` axis. For the optimizer that axis is a
batch of separate tensors: every scale, clip and factor below is taken per layer, so a stack is
updated exactly as its layers would be one by one. The `expert` axis belongs to its tensor (one
root mean square for all experts of a layer, as in the reference code) but is never factored.

The state is plain nested dicts: `count` (updates applied so far) and `slots`, which mirrors the
parameters with a dict for each: `v_row` and `v_col` when factored, else `v`, and `m`
when there is momentum.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glamcli.config.schema import Optimizer
from glamcli.config.sharding import Axes
from glamcli.parallel.axes import Tree

SQUARE_EPSILON = 1e-30
PARAMETER_SCALE_FLOOR = 1e-3
ADAM_EPSILON = 1e-8

STACKED = "layers"
NEVER_FACTORED = (STACKED, "expert")


def own_dims(axes: Axes) -> tuple[int, ...]:
    """The dimensions of one layer's tensor: all but the stacking of layers."""
    return tuple(i for i, axis in enumerate(axes) if axis != STACKED)


def factored_dims(
    settings: Optimizer, axes: Axes, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dimensions of rows and those of columns: the two largest, in order, when the second
    largest has at least `factored_min_dim` (lingvo's Adafactor); of equal ones the later are taken.

    With `factor_heads` `merged` heads and their width are one dimension, as in the published
    configurations of GLaM and DenseLm, which store these weights as [M, N x D].
    """
    assert len(axes) == len(shape), f"axes {axes} do not describe shape {shape}"
    if settings.name != "adafactor":
        return None
    candidates = [(i,) for i, axis in enumerate(axes) if axis not in NEVER_FACTORED]
    if settings.factor_heads == "merged" and "head_dim" in axes:
        heads = (axes.index("heads"), axes.index("head_dim"))
        candidates = [heads, *(dims for dims in candidates if dims[0] not in heads)]
    largest = sorted(candidates, key=lambda dims: (_size(shape, dims), dims))[-2:]
    if len(largest) < 2 or _size(shape, largest[0]) < settings.factored_min_dim:
        return None
    row, col = sorted(largest)
    return row, col


def learning_rate(settings: Optimizer, step: Array | int) -> Array:
    """Rate of update `step`, counted from 1: constant to `hold_steps`, then falling with the
    inverse square root (GLaM section 5), after a linear warm-up if there is one."""
    t = jnp.asarray(step, jnp.float32)
    rate = settings.learning_rate * jnp.sqrt(
        settings.hold_steps / jnp.maximum(t, float(settings.hold_steps))
    )
    if settings.warmup_steps:
        rate = rate * jnp.minimum(1.0, t / settings.warmup_steps)
    return rate


def second_moment_decay(settings: Optimizer, t: Array) -> Array:
    """1 - t^-exponent for update t, counted from 1: the first update keeps nothing."""
    return 1.0 - t.astype(jnp.float32) ** (-settings.decay_exponent)


def global_norm(tree: Tree) -> Array:
    """Root of the sum of squares of every element."""
    total = jnp.float32(0.0)
    for x in jax.tree.leaves(tree):
        squares = _sum_of_squares(x, (x.ndim - 1,) if x.ndim else ())
        # XLA would fold the two sums into one pass of its own; apart, the row sums are the ones
        # that Adafactor needs as well.
        total = total + jnp.sum(_reread(squares))
    return jnp.sqrt(total)


@jax.named_scope("param_norm")
def parameter_norm(params: Tree, axes: Tree) -> Array:
    """Root of the sum of squares of all parameters, from the sums that scaling needs anyway."""
    sums = jax.tree.map(lambda p, a: _reread(_sum_of_squares(p, own_dims(a))), params, axes)
    return jnp.sqrt(sum((jnp.sum(x) for x in jax.tree.leaves(sums)), start=jnp.float32(0.0)))


def init_opt_state(settings: Optimizer, axes: Tree, params: Tree) -> dict[str, Tree]:
    """The optimizer's state before the first update, all zeros."""

    def empty(p: Array, names: Axes) -> dict[str, Array]:
        dims = slot_dims(settings, names, p.shape)
        return {k: jnp.zeros([p.shape[i] for i in d], p.dtype) for k, d in dims.items()}

    return {"count": jnp.zeros((), jnp.int32), "slots": jax.tree.map(empty, params, axes)}


def checked_update(
    settings: Optimizer, axes: Tree, grads: Tree, state: dict[str, Tree], params: Tree
) -> tuple[Tree, dict[str, Tree], Array, Array]:
    """What to add to the parameters, the next state, whether all of both is finite, and the norm of
    the update before momentum. Apart from a few reductions all of it is elementwise, so under `jit`
    it fuses with the addition.

    Holds for gradients whose norm is finite. Looks at sums that the update needs anyway and at the
    old state, because XLA would keep every update whole until the last of them was looked at.
    """
    t = state["count"] + 1
    if settings.clip_grad_norm is not None:
        shrink = jnp.minimum(1.0, settings.clip_grad_norm / global_norm(grads))
        grads = jax.tree.map(lambda g: g * shrink, grads)
    update_leaf = _adafactor if settings.name == "adafactor" else _adamw

    tree = jax.tree.structure(params)
    trees = [tree.flatten_up_to(each) for each in (axes, grads, state["slots"], params)]
    leaves = [update_leaf(settings, t, *each) for each in zip(*trees, strict=True)]
    updates, slots, bounds, squares = zip(*leaves, strict=True)
    finite = jnp.isfinite(sum((jnp.sum(x) for x in bounds), start=0.0))
    norm = jnp.sqrt(sum(squares, start=jnp.float32(0.0)))
    return tree.unflatten(updates), {"count": t, "slots": tree.unflatten(slots)}, finite, norm


def optimizer_axes(settings: Optimizer, axes: Tree, shapes: Tree) -> dict[str, Tree]:
    """Axis names of every array of the optimizer state, in its structure."""

    def names_of(shape: jax.ShapeDtypeStruct, names: Axes) -> dict[str, Axes]:
        dims = slot_dims(settings, names, shape.shape)
        return {k: tuple(names[i] for i in d) for k, d in dims.items()}

    return {"count": (), "slots": jax.tree.map(names_of, shapes, axes)}


def slot_dims(
    settings: Optimizer, axes: Axes, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Which dimensions of a parameter each array kept for it has."""
    everything = tuple(range(len(shape)))
    factored = factored_dims(settings, axes, shape)
    if factored is None:
        slots = {"v": everything}
    else:
        row, col = factored
        slots = {
            "v_row": tuple(i for i in everything if i not in col),
            "v_col": tuple(i for i in everything if i not in row),
        }
    if settings.name == "adamw" or settings.beta1:
        slots["m"] = everything
    return slots


def _adafactor(
    settings: Optimizer, t: Array, axes: Axes, grad: Array, slot: dict[str, Array], p: Array
) -> tuple[Array, dict[str, Array], Array, Array]:
    """One parameter's update, new state, a bound that is finite only if both are, and the update's
    sum of squares before momentum (Adafactor, arXiv 1804.04235, algorithms 4 and 5)."""
    own = own_dims(axes)
    keep = second_moment_decay(settings, t)
    factored = factored_dims(settings, axes, p.shape)
    new: dict[str, Array] = {}
    if factored is None:
        new["v"] = keep * slot["v"] + (1.0 - keep) * (jnp.square(grad) + SQUARE_EPSILON)
        factors = (grad, jax.lax.rsqrt(new["v"]))
    else:
        row, col = factored
        for name, away in (("v_row", col), ("v_col", row)):
            total = jnp.squeeze(_sum_of_squares(grad, away), away)
            mean = total / _size(p.shape, away) + SQUARE_EPSILON
            new[name] = keep * slot[name] + (1.0 - keep) * mean
            grad = _reread(grad)
        rows = jnp.expand_dims(new["v_row"], col)
        cols = jnp.expand_dims(new["v_col"], row)
        mean = jnp.mean(rows, axis=row, keepdims=True)
        # rows / mean would underflow to 0 at a row without gradient beside large ones.
        factors = (grad, jax.lax.rsqrt(rows) * jnp.sqrt(mean), jax.lax.rsqrt(cols))
    scale = -learning_rate(settings, t)
    if settings.scale_by_parameter:
        rms = jnp.sqrt(_sum_of_squares(p, own) / _size(p.shape, own))
        scale = scale * jnp.maximum(rms, PARAMETER_SCALE_FLOOR)
    squares = _sum_of_squares(_product(factors), own)
    if settings.clip_update_rms is not None:
        rms = jnp.sqrt(squares / _size(p.shape, own))
        scale = scale / jnp.maximum(1.0, rms / settings.clip_update_rms)
    step = scale * _product(_reread(factors))
    norms = jnp.abs(scale) * jnp.sqrt(squares)
    bound = jnp.sum(norms) + sum(jnp.sum(x) for x in new.values())
    if settings.beta1:
        bound = bound + _norm(slot["m"])
        step = new["m"] = settings.beta1 * slot["m"] + (1.0 - settings.beta1) * step
    return step, new, bound, jnp.sum(jnp.square(norms))


def _adamw(
    settings: Optimizer, t: Array, axes: Axes, grad: Array, slot: dict[str, Array], p: Array
) -> tuple[Array, dict[str, Array], Array, Array]:
    """The same by AdamW (arXiv 1711.05101, algorithm 2); the sum of squares is with momentum and
    without weight decay."""
    beta1, beta2 = settings.beta1, settings.beta2
    time = t.astype(jnp.float32)

    def moments(grad: Array, slot: dict[str, Array]) -> tuple[Array, Array, Array]:
        m = beta1 * slot["m"] + (1.0 - beta1) * grad
        v = beta2 * slot["v"] + (1.0 - beta2) * jnp.square(grad)
        unbiased_m = m / (1.0 - beta1**time)
        unbiased_v = v / (1.0 - beta2**time)
        return m, v, unbiased_m / (jnp.sqrt(unbiased_v) + ADAM_EPSILON)

    m, v, step = moments(grad, slot)
    squares = jnp.sum(jnp.square(moments(*_reread((grad, slot)))[2]))
    # A gradient of finite norm has no element larger than the root of the largest number.
    largest_m = _norm(slot["m"]) + float(np.finfo(np.float32).max) ** 0.5
    bound = largest_m / (1.0 - beta1**time) / ADAM_EPSILON
    # Not of norm scales, nor of the relative position bias.
    if settings.weight_decay and len(own_dims(axes)) > 1 and "buckets" not in axes:
        step = step + settings.weight_decay * p
        bound = bound + settings.weight_decay * _norm(p)
    rate = learning_rate(settings, t)
    bound = rate * bound + jnp.sum(slot["v"])
    return -rate * step, {"m": m, "v": v}, bound, jnp.square(rate) * squares


def _reread(arrays: Any) -> Any:
    """The same arrays, to be read again by what comes next.

    Without it XLA writes one full-size product for two consumers, where reading the gradient
    once more inside each is several times cheaper: measured on CPU, half the time of an update
    and none of its temporary memory.
    """
    return jax.lax.optimization_barrier(arrays)


def _product(factors: tuple[Array, ...]) -> Array:
    return functools.reduce(jnp.multiply, factors)


def _sum_of_squares(x: Array, dims: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.square(x), axis=dims, keepdims=True)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _size(shape: tuple[int, ...], dims: tuple[int, ...]) -> float:
    """Elements; as a float, for all experts of a layer together may be more than an int32 holds."""
    return float(math.prod(shape[i] for i in dims))
