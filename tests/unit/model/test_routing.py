import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config.schema import Moe
from glamcli.config.sizes import slots_per_expert
from glamcli.model import routing
from unit.model import moe_oracle

# A worked example: one group of six tokens, three experts.
PROBS_SE = np.array(
    [
        [0.70, 0.20, 0.10],
        [0.60, 0.30, 0.10],
        [0.50, 0.10, 0.40],
        [0.20, 0.70, 0.10],
        [0.10, 0.35, 0.55],
        [0.45, 0.15, 0.40],
    ]
)
ALL_REAL = np.ones(6, bool)


def decide(probs_SE, real_S=ALL_REAL, *, slots, key=None, **settings):
    moe = Moe(num_experts=probs_SE.shape[1], **settings)
    logits_GSE = jnp.log(jnp.asarray(probs_SE, jnp.float32))[None]
    jitted = jax.jit(routing.decide, static_argnums=(2, 3))
    route, probs_GSE = jitted(logits_GSE, jnp.asarray(real_S)[None], moe, slots, key)
    return jax.tree.map(lambda a: np.asarray(a)[0], route), probs_GSE


def places(route):
    """{(token, choice): (expert, slot)} of kept choices."""
    return {
        (int(s), int(k)): (int(route.expert_GSK[s, k]), int(route.slot_GSK[s, k]))
        for s, k in zip(*np.nonzero(route.kept_GSK), strict=True)
    }


def test_worked_example_with_two_slots():
    route, _ = decide(PROBS_SE, slots=2)
    assert places(route) == {
        (0, 0): (0, 0),
        (0, 1): (1, 1),
        (1, 0): (0, 1),
        (2, 1): (2, 1),
        (3, 0): (1, 0),
        (4, 0): (2, 0),
    }
    expected_SK = [
        [0.777778, 0.222222],
        [0.666667, 0],
        [0, 0.444444],
        [0.777778, 0],
        [0.611111, 0],
        [0, 0],
    ]
    np.testing.assert_allclose(route.weight_GSK, expected_SK, atol=1e-6)


def test_worked_example_normalised_after_drops():
    route, _ = decide(PROBS_SE, slots=2, normalize="after_drop")
    expected_SK = [[0.777778, 0.222222], [1, 0], [0, 1], [1, 0], [1, 0], [0, 0]]
    np.testing.assert_allclose(route.weight_GSK, expected_SK, atol=1e-6)


@pytest.mark.parametrize("normalize", ["before_capacity", "after_drop"])
def test_worked_example_with_four_slots_drops_one_choice(normalize):
    route, _ = decide(PROBS_SE, slots=4, normalize=normalize)
    assert [tuple(c) for c in np.argwhere(~route.kept_GSK)] == [(3, 1)]
    first_of_token_3 = 0.777778 if normalize == "before_capacity" else 1.0
    expected_SK = [
        [0.777778, 0.222222],
        [0.666667, 0.333333],
        [0.555556, 0.444444],
        [first_of_token_3, 0],
        [0.611111, 0.388889],
        [0.529412, 0.470588],
    ]
    np.testing.assert_allclose(route.weight_GSK, expected_SK, atol=1e-6)


def balance_loss(probs_GSE, first_GS, real_GS, padding):
    total, num_groups = routing.balance_sums(probs_GSE, first_GS, real_GS, padding)
    return float(total) / max(int(num_groups), 1)


@pytest.mark.parametrize(
    ("num_real", "padding", "expected"),
    [
        (6, "legacy", 1.1375),
        (6, "corrected", 1.1375 / (1 + 1e-6) ** 2),
        (5, "legacy", 0.766667),
        (5, "corrected", 1.1040),
    ],
)
def test_worked_example_balance_loss(num_real, padding, expected):
    real_GS = jnp.arange(6)[None, :] < num_real
    first_GS = jnp.argmax(jnp.asarray(PROBS_SE), axis=-1)[None]
    probs_GSE = jnp.asarray(PROBS_SE, jnp.float32)[None]
    loss = balance_loss(probs_GSE, first_GS, real_GS, padding)
    np.testing.assert_allclose(loss, expected, rtol=4e-6)


def test_balance_loss_is_one_when_uniform_and_averages_groups():
    probs_GSE = jnp.full((2, 8, 4), 0.25)
    first_GS = jnp.broadcast_to(jnp.arange(8) % 4, (2, 8))
    real_GS = jnp.ones((2, 8), bool)
    np.testing.assert_allclose(balance_loss(probs_GSE, first_GS, real_GS, "legacy"), 1.0, rtol=1e-6)
    collapsed_GSE = probs_GSE.at[1].set(jnp.eye(4)[jnp.zeros(8, int)])
    loss = balance_loss(collapsed_GSE, first_GS.at[1].set(0), real_GS, "legacy")
    np.testing.assert_allclose(loss, (1 + 4) / 2, rtol=1e-6)


@pytest.mark.parametrize("padding", ["legacy", "corrected"])
def test_balance_loss_has_its_gradient_through_the_mean_probability_alone(padding):
    probs_GSE = jnp.asarray(PROBS_SE, jnp.float32)[None]
    first_GS = jnp.argmax(probs_GSE, axis=-1)
    real_GS = jnp.arange(6)[None, :] < 5
    slope = jax.grad(lambda probs: routing.balance_sums(probs, first_GS, real_GS, padding)[0])
    share_E = np.array([3, 1, 1]) / 5  # of first choices, a constant
    weight = (5 / 6) ** 2 if padding == "legacy" else 1
    expected_SE = np.tile(3 * weight * share_E / 5, (6, 1)) * np.asarray(real_GS[0])[:, None]
    np.testing.assert_allclose(slope(probs_GSE)[0], expected_SE, rtol=4e-6)


def test_corrected_balance_loss_ignores_groups_without_real_tokens():
    probs_GSE = jnp.asarray(np.stack([PROBS_SE, PROBS_SE]), jnp.float32)
    real_GS = jnp.asarray(np.stack([ALL_REAL, ~ALL_REAL]))
    loss = balance_loss(probs_GSE, jnp.argmax(probs_GSE, -1), real_GS, "corrected")
    np.testing.assert_allclose(loss, 1.1375, rtol=4e-6)


@pytest.mark.parametrize(
    ("group_tokens", "num_experts", "factor", "expected"),
    [
        (1024, 64, 2.0, 32),
        (1024, 64, 1.25, 20),
        (100, 8, 2.0, 28),  # 25 before rounding up
        (16, 64, 2.0, 4),  # 0 before the minimum
        (128, 64, 2.0, 4),
        (192, 64, 2.0, 8),
        (1024, 8, 1.0, 128),
    ],
)
def test_capacity_rounds_up_to_a_multiple_of_four(group_tokens, num_experts, factor, expected):
    assert slots_per_expert(group_tokens, num_experts, factor) == expected


def test_top_1_weight_is_the_raw_probability():
    route, _ = decide(PROBS_SE, slots=2, experts_per_token=1)
    np.testing.assert_allclose(route.weight_GSK[:, 0], [0.7, 0.6, 0, 0.7, 0.55, 0], rtol=1e-6)


def test_ties_go_to_the_lowest_expert():
    route, _ = decide(np.full((5, 4), 0.25), np.ones(5, bool), slots=None)
    assert route.expert_GSK.tolist() == [[0, 1]] * 5


def test_second_differs_from_first_when_all_other_probabilities_underflow():
    logits_GSE = jnp.array([[[-200.0, -300.0, 0.0], [0.0, -200.0, -200.0]]])
    route, probs_GSE = routing.decide(logits_GSE, jnp.ones((1, 2), bool), Moe(num_experts=3), 4)
    assert float(probs_GSE[0, 0, 0]) == 0
    assert route.expert_GSK.tolist() == [[[2, 0], [0, 1]]]
    assert route.weight_GSK.tolist() == [[[1, 0], [1, 0]]]


@pytest.mark.parametrize("normalize", ["before_capacity", "after_drop"])
def test_a_second_choice_of_probability_zero_takes_no_slot_and_is_not_served(normalize):
    logits_GSE = (
        jnp.tile(jnp.array([0.0, -200.0, -300.0]), (1, 4, 1))
        .at[0, 3]
        .set(jnp.array([-1.0, 0.0, -2.0]))
    )
    moe, real_GS = Moe(num_experts=3, normalize=normalize), jnp.ones((1, 4), bool)
    route, probs_GSE = routing.decide(logits_GSE, real_GS, moe, 4)
    assert route.wanted_GSK[0].tolist() == [[True, False]] * 3 + [[True, True]]
    assert int(route.slot_GSK[0, 3, 0]) == 0, "nobody else is in the queue of expert 1"
    sums = routing.tally(route, logits_GSE, probs_GSE, real_GS, "corrected")
    assert sums["served_3"].tolist() == [0, 3, 1]
    assert sums["wanted_K"].tolist() == [4, 1]
    np.testing.assert_allclose(jnp.sum(route.weight_GSK, axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("logit", [-24.6, -80.0])
def test_a_lone_surviving_second_choice_weighs_one_after_drops(logit):
    """Expert 0 has one slot, so the second token's first choice is dropped."""
    logits_GSE = jnp.tile(jnp.array([0.0, logit, -100.0]), (1, 2, 1))
    moe = Moe(num_experts=3, normalize="after_drop")

    def weight(logits_GSE):
        route, _ = routing.decide(logits_GSE, jnp.ones((1, 2), bool), moe, 1)
        return route.weight_GSK[0, 1]

    # The first token's second choice is ahead of it in the queue of expert 1.
    logits_GSE = logits_GSE.at[0, 0].set(jnp.array([0.0, -300.0, -300.0]))
    assert weight(logits_GSE).tolist() == [0, 1]
    assert np.isfinite(jax.jacobian(weight)(logits_GSE)).all()


def test_places_and_counts_are_whole_numbers_beyond_what_bfloat16_counts():
    num = 600
    logits_GSE = jnp.log(jnp.tile(jnp.array([0.8, 0.2]), (1, num, 1)))
    real_GS = jnp.ones((1, num), bool)
    route, probs_GSE = jax.jit(routing.decide, static_argnums=(2, 3))(
        logits_GSE, real_GS, Moe(num_experts=2), None
    )
    for choice in (0, 1):
        assert route.slot_GSK[0, :, choice].tolist() == list(range(num))
    found = jax.jit(routing.tally, static_argnums=4)(
        route, logits_GSE, probs_GSE, real_GS, "corrected"
    )
    assert found["kept_E"].tolist() == found["kept_K"].tolist() == [num, num]
    counts = {name for name, value in found.items() if value.dtype == jnp.int32}
    assert counts == {*found} - {"balance_sum", "router_z_sum", "entropy_sum"}
    assert float(routing.summary(found)["dead_experts"]) == 0, "second choices reach an expert too"


def test_padding_takes_no_slot():
    real_S = np.array([False, True, False, True, True, True])
    route, _ = decide(PROBS_SE, real_S, slots=2)
    assert not route.kept_GSK[~real_S].any()
    assert places(route)[1, 0] == (0, 0)
    assert places(route)[5, 0] == (0, 1)


def random_case(seed, G=3, S=50, E=5):
    rng = np.random.default_rng(seed)
    return 1.5 * rng.normal(size=(G, S, E)), rng.random((G, S)) < 0.9


@pytest.mark.parametrize(
    ("policy", "normalize", "top", "slots", "gate"),
    [
        ("all", "before_capacity", 2, 16, "normalized"),
        ("all", "after_drop", 2, 16, "normalized"),
        ("all", "after_drop", 2, None, "normalized"),
        ("all", "before_capacity", 1, 8, "normalized"),
        ("random", "before_capacity", 2, 16, "normalized"),
        ("random", "after_drop", 2, 16, "normalized"),
        ("random", "after_drop", 2, 16, "raw"),
        ("sampling", "before_capacity", 2, 16, "normalized"),
    ],
)
def test_agrees_with_a_loop_over_tokens(policy, normalize, top, slots, gate):
    logits_GSE, real_GS = random_case(top)
    moe = Moe(
        num_experts=5,
        experts_per_token=top,
        second_policy=policy,
        second_threshold=0.7,
        second_gate=gate,
        normalize=normalize,
    )
    key = jax.random.key(3)
    route, probs_GSE = jax.jit(routing.decide, static_argnums=(2, 3))(
        jnp.asarray(logits_GSE, jnp.float32), jnp.asarray(real_GS), moe, slots, key
    )
    route, probs_GSE = jax.tree.map(np.asarray, (route, probs_GSE))
    draw_GS = np.asarray(jax.random.uniform(key, real_GS.shape, jnp.float32))
    noise_GSE = np.asarray(jax.random.gumbel(key, logits_GSE.shape, jnp.float32))
    for g in range(3):
        tokens = moe_oracle.choose(
            np.asarray(probs_GSE[g], np.float64),
            real_GS[g],
            top=top,
            slots=slots,
            normalize=normalize,
            threshold=0.7,
            gate=gate,
            draw_S=draw_GS[g] if policy == "random" else None,
            noise_SE=noise_GSE[g] if policy == "sampling" else None,
        )
        for s, choices in enumerate(tokens):
            for k, choice in enumerate(choices):
                assert int(route.expert_GSK[g, s, k]) == choice.expert
                assert bool(route.kept_GSK[g, s, k]) == choice.kept
                assert bool(route.wanted_GSK[g, s, k]) == choice.wanted
                if choice.kept:
                    assert int(route.slot_GSK[g, s, k]) == choice.slot
                np.testing.assert_allclose(route.weight_GSK[g, s, k], choice.weight, atol=1e-6)


def test_random_policy_keeps_seconds_in_proportion_to_their_weight():
    num = 20_000
    probs_SE = np.tile([[0.8, 0.2]], (num, 1))
    route, _ = decide(
        probs_SE,
        np.ones(num, bool),
        slots=None,
        key=jax.random.key(0),
        second_policy="random",
        second_threshold=0.5,
    )
    assert route.kept_GSK[:, 0].all()
    assert abs(route.kept_GSK[:, 1].mean() - 0.2 / 0.5) < 4 * (0.4 * 0.6 / num) ** 0.5


def test_sampling_policy_draws_seconds_from_the_rest():
    num = 20_000
    probs_SE = np.tile([[0.5, 0.3, 0.2]], (num, 1))
    route, _ = decide(
        probs_SE, np.ones(num, bool), slots=None, key=jax.random.key(0), second_policy="sampling"
    )
    assert (route.expert_GSK[:, 0] == 0).all()
    share = (route.expert_GSK[:, 1] == 1).mean()
    assert abs(share - 0.6) < 4 * (0.6 * 0.4 / num) ** 0.5


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_without_a_key_every_policy_is_all(policy):
    expected, _ = decide(PROBS_SE, slots=2)
    found, _ = decide(PROBS_SE, slots=2, second_policy=policy)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def measured(logits_GSE, real_GS, moe, slots):
    route, probs_GSE = routing.decide(logits_GSE, real_GS, moe, slots)
    tally = routing.tally(route, logits_GSE, probs_GSE, real_GS, moe.balance_padding)
    return routing.summary(tally)


def test_diagnostics_of_the_worked_example():
    moe = Moe(num_experts=3)
    logits_GSE = jnp.log(jnp.asarray(PROBS_SE, jnp.float32))[None]
    real_GS = jnp.ones((1, 6), bool)
    found = measured(logits_GSE, real_GS, moe, 2)
    np.testing.assert_allclose(found["wanted_E"], [5 / 12, 4 / 12, 3 / 12], rtol=1e-6)
    np.testing.assert_allclose(found["first_E"], [4 / 6, 1 / 6, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(found["dropped_first_frac"], 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(found["dropped_second_frac"], 4 / 6, rtol=1e-6)
    np.testing.assert_allclose(found["dropped_frac"], 6 / 12, rtol=1e-6)
    np.testing.assert_allclose(found["served_3"], [1 / 6, 4 / 6, 1 / 6], rtol=1e-6)
    entropy = -(PROBS_SE * np.log(PROBS_SE)).sum(axis=1).mean()
    np.testing.assert_allclose(found["router_entropy_nats"], entropy, rtol=1e-6)
    assert float(found["dead_experts"]) == 0


def test_diagnostics_count_what_is_real():
    real_S = np.array([True, True, False, False, False, False])
    moe = Moe(num_experts=3, experts_per_token=1)
    logits_GSE = jnp.log(jnp.asarray(PROBS_SE, jnp.float32))[None]
    found = measured(logits_GSE, jnp.asarray(real_S)[None], moe, 4)
    assert found["wanted_E"].tolist() == [1, 0, 0]
    assert found["served_3"].tolist() == [0, 1, 0]
    assert float(found["dead_experts"]) == 2
    assert float(found["dropped_frac"]) == 0
    assert float(found["dropped_second_frac"]) == 0


def test_router_z_loss_is_the_mean_over_real_tokens():
    logits_GSE = jnp.array([[[0.0, 0.0], [1.0, 2.0], [50.0, 0.0]]])
    real_GS = jnp.array([[True, True, False]])
    expected = (np.log(2) ** 2 + np.log(np.e + np.e**2) ** 2) / 2
    found = measured(logits_GSE, real_GS, Moe(num_experts=2), 4)["router_z_loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tallies_of_parts_add_up_to_the_whole():
    logits_GSE = jax.random.normal(jax.random.key(0), (4, 6, 3)) * 3
    real_GS = jnp.arange(24).reshape(4, 6) % 5 > 0
    real_GS = real_GS.at[3].set(False)  # a group without tokens
    moe = Moe(num_experts=3)
    whole = measured(logits_GSE, real_GS, moe, 2)
    sums = []
    for part in (slice(0, 1), slice(1, 4)):
        route, probs_GSE = routing.decide(logits_GSE[part], real_GS[part], moe, 2)
        sums.append(routing.tally(route, logits_GSE[part], probs_GSE, real_GS[part], "corrected"))
    parts = routing.summary(jax.tree.map(jnp.add, *sums))
    assert 0 < whole["dropped_frac"] < 1
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)
