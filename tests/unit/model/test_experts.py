import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config.schema import Model, Moe
from glamcli.model.experts import MoeLayer, Routing
from glamcli.model.params import blueprint
from glamcli.model.routing import summary
from unit.model import moe_oracle

MODEL = Model(num_layers=2, model_dim=8, ffn_dim=12, num_heads=1, head_dim=8, vocab_size=8)
B, S = 3, 16


def build(**settings):
    plan = blueprint(lambda rngs: MoeLayer(rngs, MODEL, Moe(num_experts=4, **settings)))
    return plan, jax.jit(plan.init)(jax.random.key(0))


def run(plan, params, x_BSM, mask_BS, dispatch):
    """Outputs and statistics."""

    def call(params, x_BSM, mask_BS):
        y_BSM, sums = plan.bind(params)(x_BSM, mask_BS, Routing(dispatch))
        return y_BSM, summary(sums)

    return jax.jit(call)(params, x_BSM, mask_BS)


def inputs(dtype=jnp.float32):
    x_BSM = jax.random.normal(jax.random.key(1), (B, S, 8), dtype)
    return x_BSM, jnp.ones((B, S), bool).at[2, 10:].set(False)


def test_parameters_have_the_paper_s_shapes_axes_and_ranges():
    plan, params = build()
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "router": (8, 4),
        "w_in": (4, 8, 12),
        "w_out": (4, 8, 12),
    }
    assert plan.axes == {
        "router": (None, None),
        "w_in": ("expert", "expert_embed", "expert_mlp"),
        "w_out": ("expert", "expert_embed", "expert_mlp"),
    }
    for name, fan_in in (("router", 8), ("w_in", 8), ("w_out", 12)):
        bound = (3 / fan_in) ** 0.5
        largest = float(jnp.max(jnp.abs(params[name])))
        assert 0.8 * bound < largest <= bound


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless"])
def test_tokens_are_grouped_in_order_and_groups_are_independent(dispatch):
    plan, params = build(group_tokens=8, capacity_factor=1.0)
    x_BSM, mask_BS = inputs()
    y_BSM, stats = run(plan, params, x_BSM, mask_BS, dispatch)
    weights = [np.asarray(params[n], np.float64) for n in ("router", "w_in", "w_out")]
    slots = None if dispatch == "dropless" else 4
    num_dropped, losses = 0, []
    for x_SM, real_S, y_SM in zip(
        np.asarray(x_BSM, np.float64).reshape(6, 8, 8),
        np.asarray(mask_BS).reshape(6, 8),
        np.asarray(y_BSM).reshape(6, 8, 8),
        strict=True,
    ):
        expected_SM, tokens, probs_SE = moe_oracle.forward(
            x_SM, *weights, real_S, top=2, slots=slots
        )
        np.testing.assert_allclose(y_SM, expected_SM, atol=1e-5)
        num_dropped += sum(c.wanted and not c.kept for choices in tokens for c in choices)
        if real_S.any():
            losses.append(moe_oracle.balance(probs_SE, tokens, real_S, "corrected"))
    np.testing.assert_allclose(stats["balance_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(stats["dropped_frac"], num_dropped / (2 * mask_BS.sum()), rtol=1e-5)
    assert (num_dropped > 0) == (dispatch != "dropless")


def test_dropless_outputs_do_not_depend_on_groups_or_on_other_tokens():
    x_BSM, mask_BS = inputs()
    found = []
    for group_tokens in (8, 1000):
        plan, params = build(group_tokens=group_tokens)
        found.append(run(plan, params, x_BSM, mask_BS, "dropless")[0])
    alone = run(plan, params, x_BSM[:1, :1], mask_BS[:1, :1], "dropless")[0]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[0][:1, :1], alone, atol=1e-6)


def test_a_bfloat16_run_routes_in_float32():
    plan, params = build()
    # Two experts whose logits differ by less than bfloat16 resolves.
    router_ME = jnp.zeros((8, 4)).at[0].set(jnp.array([1.0, 1.001, 0.5, 0.0]))
    x_BSM = jnp.ones((1, 4, 8), jnp.bfloat16)
    params = params | {"router": router_ME}
    y_BSM, stats = run(plan, params, x_BSM, jnp.ones((1, 4), bool), "dropless")
    assert y_BSM.dtype == jnp.bfloat16
    assert stats["first_E"].tolist() == [0, 1, 0, 0]
    assert all(value.dtype == jnp.float32 for value in stats.values())


def test_losses_reach_the_router_and_diagnostics_do_not():
    plan, params = build(group_tokens=8)
    x_BSM, mask_BS = inputs()

    _, stats = run(plan, params, x_BSM, mask_BS, "gather")
    losses = ["balance_loss", "router_z_loss"]
    others = [name for name in stats if name not in losses]

    @jax.jit
    def router_gradients(params):
        def total(names, params):
            stats = run(plan, params, x_BSM, mask_BS, "gather")[1]
            return sum((jnp.sum(stats[name]) for name in names), jnp.zeros(()))

        return [
            jax.grad(functools.partial(total, names))(params)["router"]
            for names in (losses, others)
        ]

    of_losses, of_others = router_gradients(params)
    assert jnp.any(of_losses != 0)
    assert not jnp.any(of_others)


def test_the_router_product_is_float32_on_every_device():
    # What a device makes of the default, bfloat16 or TF32, a CPU cannot show; the program can.
    plan, params = build()
    x_BSM, mask_BS = inputs(jnp.bfloat16)
    program = jax.make_jaxpr(lambda p, x, m: plan.bind(p)(x, m, Routing("gather")))(
        params, x_BSM, mask_BS
    )
    router = next(e for e in program.eqns if e.primitive.name == "dot_general")
    assert router.outvars[0].aval.shape[-1] == 4
    assert {v.aval.dtype for v in router.invars} == {jnp.dtype("float32")}
    assert router.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_dropless_is_no_product_with_every_expert_on_an_accelerator(monkeypatch):
    """As `jax.lax.ragged_dot` is on NVIDIA GPUs, v5e and v6e."""
    for module in ("experts", "kernels.experts", "kernels.linear"):
        name = f"glamcli.model.{module}.platform"
        monkeypatch.setattr(name, lambda: "gpu", raising=False)
    plan, params = build()
    call = partial(plan.bind(params), how=Routing("dropless"))
    assert "ragged_dot" not in str(jax.make_jaxpr(call)(*inputs()))
