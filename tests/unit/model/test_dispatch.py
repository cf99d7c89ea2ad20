import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config.schema import Moe
from glamcli.model import dispatch, routing
from glamcli.model.kernels.experts import Experts
from unit.model import moe_oracle

G, S, M, H, E = 2, 24, 6, 10, 4


def case(seed=0, dtype=np.float32):
    """x [G, S, M], router, w_in, w_out, which tokens are real, and a gradient of y."""
    rng = np.random.default_rng(seed)
    x, router = rng.normal(size=(G, S, M)), rng.normal(size=(M, E))
    w_in, w_out = rng.normal(size=(2, E, M, H))
    # Rounded first, so the float64 oracle sees the same numbers.
    arrays = [np.asarray(a, np.float32) for a in (x, router, w_in, w_out)]
    return arrays, rng.random((G, S)) < 0.9, np.asarray(rng.normal(size=(G, S, M)), np.float32)


def run(move, moe, slots, x_GSM, router_ME, w_in_EMH, w_out_EMH, real_GS, key=None):
    logits_GSE = jnp.einsum("GSM,ME->GSE", x_GSM.astype(jnp.float32), router_ME)
    route, _ = routing.decide(logits_GSE, real_GS, moe, slots, key)
    return move(x_GSM, route, slots, Experts(w_in_EMH, w_out_EMH, moe.expert_activation))


def dropless(x_GSM, route, slots, experts):
    assert slots is None
    return dispatch.dropless(x_GSM, route, experts)


MOVES = {"einsum": dispatch.einsum, "gather": dispatch.gather, "dropless": dropless}


def outputs_and_gradients(name, moe, slots, arrays, real_GS, dy_GSM, key=None):
    f = jax.jit(lambda *a: run(MOVES[name], moe, slots, *a, jnp.asarray(real_GS), key))
    y_GSM, pull = jax.vjp(f, *arrays)
    return [np.asarray(a, np.float32) for a in (y_GSM, *pull(jnp.asarray(dy_GSM, y_GSM.dtype)))]


def oracle(moe, slots, arrays, real_GS, dy_GSM):
    x_GSM, *weights = (np.asarray(a, np.float64) for a in arrays)
    rules = {
        "top": moe.experts_per_token,
        "slots": slots,
        "normalize": moe.normalize,
        "activation": moe.expert_activation,
    }
    y_GSM, dx_GSM = np.zeros_like(x_GSM), np.zeros_like(x_GSM)
    sums = [np.zeros_like(w) for w in weights]
    for g in range(G):
        y_GSM[g] = moe_oracle.forward(x_GSM[g], *weights, real_GS[g], **rules)[0]
        dy_SM = np.asarray(dy_GSM[g], np.float64)
        dx, *dw = moe_oracle.gradients(dy_SM, x_GSM[g], *weights, real_GS[g], **rules)
        dx_GSM[g] = dx
        for total, one in zip(sums, dw, strict=True):
            total += one
    return [y_GSM, dx_GSM, *sums]


def assert_close(found, expected, rtol=2e-5):
    for name, a, b in zip(("y", "x", "router", "w_in", "w_out"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), rtol=0, err_msg=name)


LEGACY = Moe(num_experts=E)
GELU_AFTER_DROP = Moe(num_experts=E, expert_activation="gelu", normalize="after_drop")
SWITCH = Moe(num_experts=E, experts_per_token=1)


@pytest.mark.parametrize(
    ("name", "slots", "moe"),
    [
        ("einsum", 8, LEGACY),
        ("einsum", 8, GELU_AFTER_DROP),
        ("gather", 8, LEGACY),
        ("gather", 8, GELU_AFTER_DROP),
        ("gather", 8, SWITCH),
        ("dropless", None, LEGACY),
        ("dropless", None, GELU_AFTER_DROP),
    ],
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(name, slots, moe):
    arrays, real_GS, dy_GSM = case()
    found = outputs_and_gradients(name, moe, slots, arrays, real_GS, dy_GSM)
    expected = oracle(moe, slots, arrays, real_GS, dy_GSM)
    assert np.abs(expected[2]).max() > 0
    assert_close(found, expected)


def test_oracle_gradients_are_those_of_finite_differences():
    arrays, real_GS, dy_GSM = case(seed=5)
    x, router, w_in, w_out = (np.asarray(a, np.float64) for a in arrays)
    rules = {"top": 2, "slots": 8, "normalize": "after_drop"}

    def loss(x, router, w_in, w_out):
        y = moe_oracle.forward(x, router, w_in, w_out, real_GS[0], **rules)[0]
        return float((y * dy_GSM[0]).sum())

    at = [x[0], router, w_in, w_out]
    exact = moe_oracle.gradients(np.asarray(dy_GSM[0], np.float64), *at, real_GS[0], **rules)
    rng = np.random.default_rng(0)
    for i in range(4):
        direction = rng.normal(size=at[i].shape)
        ends = [loss(*at[:i], at[i] + t * direction, *at[i + 1 :]) for t in (1e-6, -1e-6)]
        np.testing.assert_allclose((exact[i] * direction).sum(), (ends[0] - ends[1]) / 2e-6, 1e-5)


def test_gather_equals_einsum_in_bfloat16():
    moe = Moe(num_experts=E, expert_activation="gelu")
    (x_GSM, *weights), real_GS, dy_GSM = case(seed=1)
    arrays = [jnp.asarray(x_GSM, jnp.bfloat16), *weights]
    by_einsum = outputs_and_gradients("einsum", moe, 8, arrays, real_GS, dy_GSM)
    by_gather = outputs_and_gradients("gather", moe, 8, arrays, real_GS, dy_GSM)
    assert_close(by_gather, by_einsum, rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropless_equals_gather_with_room_for_everything(dtype):
    (x_GSM, *weights), real_GS, dy_GSM = case(seed=2)
    arrays = [jnp.asarray(x_GSM, dtype), *weights]
    moe = Moe(num_experts=E)
    expected = outputs_and_gradients("gather", moe, S, arrays, real_GS, dy_GSM)
    found = outputs_and_gradients("dropless", moe, None, arrays, real_GS, dy_GSM)
    assert_close(found, expected, rtol=2e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("name", ["einsum", "gather", "dropless"])
def test_experts_without_tokens_get_zero_gradients_and_padding_gets_zero_outputs(name):
    (x_GSM, router_ME, w_in, w_out), real_GS, dy_GSM = case(seed=3)
    router_ME = np.zeros_like(router_ME)  # ties: everything goes to experts 0 and 1
    slots = 48 if name in ("einsum", "gather") else None
    y, dx, _, dw_in, dw_out = outputs_and_gradients(
        name, Moe(num_experts=E), slots, [x_GSM, router_ME, w_in, w_out], real_GS, dy_GSM
    )
    assert not y[~real_GS].any()
    assert not dx[~real_GS].any()
    assert y[real_GS].all()
    assert not dw_in[2:].any()
    assert not dw_out[2:].any()
    assert dw_in[:2].any()


@pytest.mark.parametrize("name", ["einsum", "gather", "dropless"])
def test_a_weight_of_zero_moves_nothing(name):
    (x_GSM, _, w_in, w_out), _, _ = case(seed=4)
    w_in[1], w_out[1] = 1e30, 1e30  # what is sent there overflows, and 0 x inf is nan
    choice = np.broadcast_to(np.array([0, 1], np.int32), (G, S, 2))
    weight = np.broadcast_to(np.array([1.0, 0.0], np.float32), (G, S, 2))
    slot = np.broadcast_to(np.arange(S, dtype=np.int32)[None, :, None], (G, S, 2))
    true = np.ones((G, S, 2), bool)
    route = routing.Route(*(jnp.asarray(a) for a in (choice, weight, slot, true, true)))
    slots = S if name in ("einsum", "gather") else None
    move = jax.jit(lambda x_GSM, *w: MOVES[name](x_GSM, route, slots, Experts(*w, "relu")))
    y_GSM = move(x_GSM, w_in, w_out)
    expected = np.maximum(x_GSM @ w_in[0], 0) @ w_out[0].T
    np.testing.assert_allclose(y_GSM, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_dropless_runs_fewer_tokens_than_experts(num_tokens):
    (x_GSM, router_ME, w_in, w_out), _, _ = case(seed=6)
    x_GSM = x_GSM[:1, :num_tokens]
    real_GS = np.ones((1, num_tokens), bool)
    moe = Moe(num_experts=E)
    y_GSM = jax.jit(functools.partial(run, dropless, moe, None))(
        x_GSM, router_ME, w_in, w_out, real_GS
    )
    weights = [np.asarray(a, np.float64) for a in (x_GSM[0], router_ME, w_in, w_out)]
    expected, _, _ = moe_oracle.forward(*weights, real_GS[0], top=2, slots=None)
    np.testing.assert_allclose(y_GSM[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_survive_transposing_neighbours(dtype):
    # XLA on CPU has no batched bfloat16 product of every layout that transposes could fold into.
    x_CEM, w_in = jnp.ones((8, E, 1, M), dtype), jnp.ones((E, M, H))

    @jax.jit
    def f(x_CEM, w_in, w_out):
        y_EGCM = Experts(w_in, w_out, "relu").on_slots(jnp.moveaxis(x_CEM, 0, 2))
        return jnp.moveaxis(y_EGCM, 2, 0).swapaxes(0, 3)

    @jax.jit
    def gradients(*arrays):
        y, pull = jax.vjp(f, *arrays)
        return y, *(dw_EMH.swapaxes(1, 2) for dw_EMH in pull(y)[1:])

    y, dw_in, dw_out = gradients(x_CEM, w_in, jnp.ones((E, M, H)))
    np.testing.assert_array_equal(y.astype(jnp.float32), M * H)
    np.testing.assert_array_equal(dw_in, 8 * M * M * H)
    np.testing.assert_array_equal(dw_out, 8 * M * M * H)


def test_block_rows_grow_with_the_rows_per_expert():
    sizes = [dispatch.block_rows(n, 64) for n in (1, 256, 4096, 8192, 65536, 10**8)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8
    assert sizes[-1] == 512
