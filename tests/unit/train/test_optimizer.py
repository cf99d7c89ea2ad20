"""The optimizer against an independent per-layer reference."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glamcli.config.schema import Optimizer
from glamcli.train.optimizer import (
    checked_update,
    factored_dims,
    init_opt_state,
    optimizer_axes,
)


class Own(NamedTuple):
    """The optimizer with the interface of optax."""

    init: Callable
    update: Callable


def make_optimizer(settings, axes):
    def update(grads, state, params):
        return checked_update(settings, axes, grads, state, params)[:2]

    return Own(functools.partial(init_opt_state, settings, axes), update)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def rate(t, peak=0.01, hold=10_000):
    return peak if t <= hold else peak * np.sqrt(hold / t)


class Reference:
    """Adafactor for one layer's tensor in float64, written from the published algorithm.

    Shares no code with the optimizer; the dimensions to factor are named by hand. `step` takes
    a gradient, `p` is the tensor.
    """

    def __init__(self, p, factor=None, clip=1.0, beta1=0.0, scale_by_parameter=True, peak=0.01):
        self.p = np.array(p, np.float64)
        self.factor, self.clip, self.beta1 = factor, clip, beta1
        self.scale_by_parameter, self.peak = scale_by_parameter, peak
        self.t = 0
        self.v = self.rows = self.cols = 0.0
        self.m = np.zeros_like(self.p)

    def step(self, grad):
        self.t += 1
        g = np.asarray(grad, np.float64)
        keep = 1.0 - self.t**-0.8
        square = g * g + 1e-30
        if self.factor is None:
            self.v = keep * self.v + (1 - keep) * square
            second = self.v
        else:
            a, b = self.factor
            self.rows = keep * self.rows + (1 - keep) * square.mean(axis=b, keepdims=True)
            self.cols = keep * self.cols + (1 - keep) * square.mean(axis=a, keepdims=True)
            second = self.rows * self.cols / self.rows.mean(axis=a, keepdims=True)
        u = g / np.sqrt(second)
        if self.clip is not None:
            u = u / max(1.0, rms(u) / self.clip)
        scale = max(rms(self.p), 1e-3) if self.scale_by_parameter else 1.0
        u = u * rate(self.t, self.peak) * scale
        if self.beta1:
            self.m = self.beta1 * self.m + (1 - self.beta1) * u
            u = self.m
        self.p = self.p - u
        return self.p


SHAPES = {
    "scalar": ((), ()),
    "scale": (("layers", "embed"), (3, 6)),
    "final": (("embed",), (6,)),
    "small": (("layers", "embed", "mlp"), (3, 4, 5)),
    "table": (("vocab", "embed"), (16, 8)),
    "dense": (("layers", "embed", "mlp"), (3, 8, 16)),
    "expert": (("layers", "expert", "expert_embed", "mlp"), (3, 32, 8, 16)),
    "heads": (("layers", "embed", "heads", "head_dim"), (3, 16, 4, 8)),
    "bias": (("layers", "heads", "buckets"), (3, 4, 9)),
    "layerless": (("layers",), (3,)),
}
FACTORED = {"table": (0, 1), "dense": (0, 1), "expert": (1, 2), "heads": (0, (1, 2))}
AXES = {"block": {k: axes for k, (axes, _) in SHAPES.items()}}
SMALL = Optimizer(factored_min_dim=8)


def random_tree(seed, spread=1.0):
    """Layers of very different scale, as real ones are."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (axes, shape) in SHAPES.items():
        x = rng.normal(size=shape)
        if axes[:1] == ("layers",):
            x = x * np.array([1.0, 0.01, 30.0]).reshape(3, *[1] * (len(shape) - 1)) ** spread
        tree[name] = np.asarray(x, np.float32)
    return {"block": tree}


def layers_of(name, x):
    """[(index of the layer, its tensor)]; index () where nothing is stacked."""
    if SHAPES[name][0][:1] == ("layers",):
        return [((i,), x[i]) for i in range(x.shape[0])]
    return [((), x)]


def run(settings, params, grads):
    optimizer = make_optimizer(settings, AXES)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, {}),
        (
            {"clip_update_rms": None, "scale_by_parameter": False, "beta1": 0.9},
            {"clip": None, "scale_by_parameter": False, "beta1": 0.9},
        ),
        ({"clip_update_rms": 0.3, "learning_rate": 0.2}, {"clip": 0.3, "peak": 0.2}),
    ],
)
def test_adafactor_equals_the_reference_layer_by_layer(changes, reference):
    params = random_tree(0)
    grads = [random_tree(seed, spread=-0.5) for seed in range(1, 6)]
    grads[3] = jax.tree.map(lambda g: g * 50.0, grads[3])  # a spike, so that clipping acts
    got, _ = run(SMALL.model_copy(update=changes), params, grads)
    for name, start in params["block"].items():
        for index, layer in layers_of(name, start):
            want = Reference(layer, FACTORED.get(name), **reference)
            for grad in grads:
                want.step(grad["block"][name][index])
            np.testing.assert_allclose(
                got["block"][name][index], want.p, rtol=2e-5, atol=1e-6 * abs(want.p).max()
            )


@pytest.mark.parametrize(
    ("axes", "shape", "matrix"),
    [
        (("layers", "embed", "heads", "head_dim"), (2, 16, 4, 6), (16, 24)),
        (("layers", "heads", "head_dim", "embed"), (2, 4, 6, 16), (24, 16)),
    ],
)
def test_heads_are_factored_as_one_dimension_for_fifty_steps(axes, shape, matrix):
    """The published configurations of GLaM and DenseLm store these weights as [M, N x D]."""
    rng = np.random.default_rng(4)
    start = np.asarray(rng.normal(size=shape), np.float32)
    grads = [np.asarray(rng.normal(size=shape), np.float32) for _ in range(50)]
    optimizer = make_optimizer(SMALL, axes)
    p, state = start, optimizer.init(start)
    assert sorted(a.ndim for a in jax.tree.leaves(state["slots"])) == [2, 3]
    update = jax.jit(optimizer.update)
    for grad in grads:
        delta, state = update(grad, state, p)
        p = p + delta
    for layer in range(2):
        want = Reference(start[layer].reshape(matrix), (0, 1))
        for grad in grads:
            want.step(grad[layer].reshape(matrix))
        moved = np.abs(want.p - start[layer].reshape(matrix)).max()
        assert moved > 0.01
        np.testing.assert_allclose(
            p[layer].reshape(matrix), want.p, rtol=0, atol=3e-6 * abs(want.p).max()
        )


@pytest.mark.parametrize("scale", [1e4, 1e5, 1e6])
def test_a_row_without_gradient_stays_put_beside_large_gradients(scale):
    p, grad = (random_tree(seed)["block"]["table"] for seed in (0, 1))
    grad = grad * np.float32(scale)
    grad[3] = 0.0
    optimizer = make_optimizer(SMALL, SHAPES["table"][0])
    update, _ = jax.jit(optimizer.update)(grad, optimizer.init(p), p)
    want = Reference(p, FACTORED["table"]).step(grad)
    np.testing.assert_allclose(p + np.asarray(update), want, rtol=2e-5, atol=1e-6 * abs(want).max())
    assert not np.asarray(update)[3].any()


@pytest.mark.parametrize("size", [1.0, 1e-15])
@pytest.mark.parametrize("name", ["small", "table"])
def test_small_weights_move_by_the_floor_of_their_scale_and_small_gradients_by_less(name, size):
    """Weights of 1e-5 count as 1e-3; squares far below 1e-30 count as that."""
    p, grad = (random_tree(seed, spread=0)["block"][name] for seed in (0, 1))
    p, grad = p * np.float32(1e-5), grad * np.float32(size)
    optimizer = make_optimizer(SMALL, SHAPES[name][0])
    update, _ = jax.jit(optimizer.update)(grad, optimizer.init(p), p)
    for index, layer in layers_of(name, p):
        moved = Reference(layer, FACTORED.get(name)).step(grad[index]) - layer
        assert 0 < rms(moved) < 1.01e-5
        np.testing.assert_allclose(
            np.asarray(update)[index], moved, rtol=2e-5, atol=1e-6 * abs(moved).max()
        )


def test_a_stack_of_layers_is_updated_like_its_layers_alone():
    params, grads = random_tree(0), [random_tree(1), random_tree(2)]
    stacked, _ = run(SMALL, params, grads)
    for name in ("dense", "expert"):
        alone = make_optimizer(SMALL, SHAPES[name][0][1:])
        update_alone = jax.jit(alone.update)
        for i in range(3):
            p = jnp.asarray(params["block"][name][i])
            state = alone.init(p)
            for grad in grads:
                update, state = update_alone(grad["block"][name][i], state, p)
                p = p + update
            scale = np.abs(np.asarray(p)).max()
            np.testing.assert_allclose(stacked["block"][name][i], p, rtol=2e-6, atol=2e-7 * scale)


def test_one_stack_under_plain_optax_adafactor_differs():
    p = random_tree(0)["block"]["dense"]
    grad = jnp.ones_like(p)
    ours = make_optimizer(SMALL, SHAPES["dense"][0])
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=8)
    mine, _ = jax.jit(ours.update)(grad, ours.init(p), p)
    other, _ = jax.jit(theirs.update)(grad, theirs.init(p), p)
    ratio = np.abs(np.asarray(other) / np.asarray(mine)).mean(axis=(1, 2))
    assert ratio[1] > 10  # the smallest layer is moved by the scale of the largest


def test_one_plain_tensor_agrees_with_optax_adafactor():
    p = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    grads = [
        jnp.asarray(np.random.default_rng(i).normal(size=(8, 16)), jnp.float32) for i in (1, 2)
    ]
    ours = make_optimizer(SMALL, ("embed", "mlp"))
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=8)

    def after(optimizer):
        state, value, update = optimizer.init(p), p, jax.jit(optimizer.update)
        for grad in grads:
            step, state = update(grad, state, value)
            value = value + step
        return value

    np.testing.assert_allclose(after(ours), after(theirs), rtol=1e-6)


def test_adamw_agrees_with_optax():
    settings = Optimizer(name="adamw", learning_rate=3e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    params = random_tree(0)
    grads = [random_tree(seed) for seed in range(1, 5)]
    got, _ = run(settings, params, grads)
    decayed = {"small", "table", "dense", "expert", "heads"}
    theirs = optax.adamw(
        3e-3, 0.9, 0.95, weight_decay=0.1, mask={"block": {k: k in decayed for k in SHAPES}}
    )
    state, want = theirs.init(params), params
    update = jax.jit(theirs.update)
    with jax.numpy_dtype_promotion("standard"):
        for grad in grads:
            updates, state = update(grad, state, want)
            want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_neither_layers_nor_experts_are_factored():
    axes = ("layers", "expert", "expert_embed", "mlp")
    assert factored_dims(Optimizer(), axes, (512, 1024, 128, 256)) == ((2,), (3,))
    assert factored_dims(Optimizer(), axes, (512, 1024, 127, 256)) is None
    assert factored_dims(Optimizer(), ("layers", "embed"), (512, 1024)) is None


def test_heads_are_factored_with_their_width_or_apart_from_it():
    query, out = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim", "embed")
    assert factored_dims(Optimizer(), query, (2, 512, 8, 64)) == ((1,), (2, 3))
    assert factored_dims(Optimizer(), out, (2, 8, 64, 512)) == ((1, 2), (3,))
    assert factored_dims(Optimizer(), query, (2, 512, 1, 64)) is None
    assert factored_dims(Optimizer(), ("heads", "buckets"), (128, 128)) == ((0,), (1,))
    separate = Optimizer(factor_heads="separate")
    assert factored_dims(separate, query, (2, 512, 8, 64)) is None
    assert factored_dims(separate, out, (2, 8, 128, 512)) == ((2,), (3,))


def test_momentum_is_kept_only_when_asked_for():
    shapes = {"w": jax.ShapeDtypeStruct((2, 128, 256), jnp.float32)}
    axes = {"w": ("layers", "embed", "mlp")}
    none = jax.eval_shape(make_optimizer(Optimizer(), axes).init, shapes)["slots"]["w"]
    assert {k: v.shape for k, v in none.items()} == {"v_row": (2, 128), "v_col": (2, 256)}
    some = jax.eval_shape(make_optimizer(Optimizer(beta1=0.9), axes).init, shapes)["slots"]["w"]
    assert some["m"].shape == (2, 128, 256)
    assert some["m"].dtype == jnp.float32


@pytest.mark.parametrize("settings", [SMALL, Optimizer(name="adamw"), Optimizer(beta1=0.5)])
def test_axes_of_the_state_fit_the_state(settings):
    shapes = {
        "block": {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (_, shape) in SHAPES.items()}
    }
    state = jax.eval_shape(make_optimizer(settings, AXES).init, shapes)
    axes = optimizer_axes(settings, AXES, shapes)
    size = {name: dict(zip(names, shape, strict=True)) for name, (names, shape) in SHAPES.items()}
    assert axes["count"] == ()
    for name, slots in state["slots"]["block"].items():
        named = axes["slots"]["block"][name]
        assert named.keys() == slots.keys()
        for slot, array in slots.items():
            assert tuple(size[name][axis] for axis in named[slot]) == array.shape


def test_a_tensor_of_more_elements_than_an_int32_holds_can_be_updated():
    # One expert layer of 64B/64E.
    w = jax.ShapeDtypeStruct((2, 64, 8192, 32768), jnp.float32)
    optimizer = make_optimizer(Optimizer(), {"w": ("layers", "expert", "expert_embed", "mlp")})
    state = jax.eval_shape(optimizer.init, {"w": w})
    update, _ = jax.eval_shape(optimizer.update, {"w": w}, state, {"w": w})
    assert update["w"].shape == w.shape


def test_the_gradient_is_scaled_down_to_its_clip_norm_and_never_up():
    axes = {"w": ("embed", "mlp")}
    settings = Optimizer(name="adamw", clip_grad_norm=1.0, beta1=0.9)
    p = {"w": jnp.ones((4, 4))}
    optimizer = make_optimizer(settings, axes)
    for size, kept in ((2.0, 0.25), (0.1, 0.1)):
        _, state = optimizer.update({"w": jnp.full((4, 4), size)}, optimizer.init(p), p)
        np.testing.assert_allclose(state["slots"]["w"]["m"], 0.1 * kept, rtol=1e-5)


SETTINGS = {
    "adafactor": SMALL,
    "unclipped": SMALL.model_copy(update={"clip_update_rms": None, "scale_by_parameter": False}),
    "momentum": SMALL.model_copy(update={"beta1": 0.9}),
    "adamw": Optimizer(name="adamw", beta1=0.9, weight_decay=0.1),
}


@functools.cache
def checked(name):
    settings = SETTINGS[name]
    return jax.jit(lambda *args: checked_update(settings, AXES, *args)[:3])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_what_is_not_finite_in_update_or_state_is_told(name, bad):
    """One number of the parameters or of one slot is made bad, in a tensor factored or not."""
    params, grads = random_tree(0), random_tree(1)
    state = make_optimizer(SETTINGS[name], AXES).init(params)
    *_, finite = checked(name)(grads, state, params)
    assert finite
    for leaf in ("table", "small"):
        for slot in (None, *state["slots"]["block"][leaf]):
            changed = jax.tree.map(lambda x: np.array(x), {"p": params, "state": state})
            slots = changed["state"]["slots"]["block"][leaf]
            (changed["p"]["block"][leaf] if slot is None else slots[slot]).flat[3] = bad
            updates, after, finite = checked(name)(grads, changed["state"], changed["p"])
            new = jax.tree.leaves((updates, after["slots"]))
            assert all(np.isfinite(x).all() for x in new) or not finite, (leaf, slot)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_near_the_largest_norm_are_no_reason_to_skip(name):
    params = random_tree(0)
    state = make_optimizer(SETTINGS[name], AXES).init(params)
    grads = jax.tree.map(lambda x: np.full(x.shape, 1e17, np.float32), params)
    for _ in range(3):
        updates, state, finite = checked(name)(grads, state, params)
        assert finite
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state["slots"])))
