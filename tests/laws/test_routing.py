"""Laws of routing that hold for any logits, padding and capacity."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glamcli.config.schema import Moe
from glamcli.model import routing

S, E = 24, 4  # one shape, so that each policy compiles once


@st.composite
def cases(draw):
    """Logits [2, S, E], with ties now and then, which tokens are real, and slots."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits_GSE = rng.normal(size=(2, S, E)) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits_GSE += rng.normal(size=E) * draw(st.sampled_from([0.0, 3.0]))
    if draw(st.booleans()):
        logits_GSE = np.round(logits_GSE)
    real_GS = rng.random((2, S)) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    return np.float32(logits_GSE), real_GS, draw(st.integers(1, S))


# slots is traced here, only to compile once for all of its values.
jitted_decide = jax.jit(routing.decide, static_argnums=(2,))
jitted_summary = jax.jit(lambda *args: routing.summary(routing.tally(*args, "corrected")))


def numpy_route(logits_GSE, real_GS, slots, normalize="before_capacity"):
    moe = Moe(num_experts=E, normalize=normalize)
    route, _ = jitted_decide(logits_GSE, real_GS, moe, jnp.int32(slots))
    return jax.tree.map(np.asarray, route)


def kept_by_expert(route):
    """{(group, expert): [(choice, token, slot)]} of kept choices."""
    queues = {}
    for g, s, k in zip(*np.nonzero(route.kept_GSK), strict=True):
        queue = queues.setdefault((g, route.expert_GSK[g, s, k]), [])
        queue.append((k, s, route.slot_GSK[g, s, k]))
    return queues


@given(cases())
@settings(max_examples=40, deadline=None)
def test_no_expert_gets_more_than_its_capacity_and_no_slot_is_used_twice(case):
    _, _, slots = case
    for queue in kept_by_expert(numpy_route(*case)).values():
        taken = [slot for _, _, slot in queue]
        assert sorted(taken) == list(range(len(taken)))
        assert len(taken) <= slots


@given(cases())
@settings(max_examples=40, deadline=None)
def test_second_choices_never_displace_first_choices(case):
    logits_GSE, real_GS, slots = case
    route = numpy_route(*case)
    for queue in kept_by_expert(route).values():
        in_queue_order = sorted(queue, key=lambda entry: entry[2])
        assert in_queue_order == sorted(queue)  # firsts by token, then seconds by token
    # Firsts fare as if there were no second choices at all.
    alone = Moe(num_experts=E, experts_per_token=1)
    firsts, _ = jitted_decide(logits_GSE, real_GS, alone, jnp.int32(slots))
    np.testing.assert_array_equal(route.kept_GSK[..., 0], firsts.kept_GSK[..., 0])


@given(cases())
@settings(max_examples=40, deadline=None)
def test_a_choice_is_dropped_only_when_its_expert_is_full(case):
    _, _, slots = case
    route = numpy_route(*case)
    queues = kept_by_expert(route)
    for g, s, k in np.argwhere(route.wanted_GSK & ~route.kept_GSK):
        assert len(queues[g, route.expert_GSK[g, s, k]]) == slots


@given(cases())
@settings(max_examples=30, deadline=None)
def test_groups_do_not_interact(case):
    logits_GSE, real_GS, slots = case
    route = numpy_route(*case)
    order = np.random.default_rng(0).permutation(S)
    shuffled = logits_GSE.copy(), real_GS.copy()
    shuffled[0][1], shuffled[1][1] = logits_GSE[1][order], real_GS[1][order]
    other = numpy_route(*shuffled, slots)
    for a, b in zip(route, other, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@given(cases(), st.integers(1, S - 1), st.sampled_from(["before_capacity", "after_drop"]))
@settings(max_examples=40, deadline=None)
def test_what_padding_holds_changes_nothing(case, num_real, normalize):
    logits_GSE, real_GS, slots = case
    real_GS = real_GS & (np.arange(S) < num_real)
    route = numpy_route(logits_GSE, real_GS, slots, normalize)
    assert not route.kept_GSK[~real_GS].any()
    # Fewer tokens with the same capacity: as if the padded end were not there.
    other = logits_GSE.copy()
    other[:, num_real:] = other[:, num_real:][..., ::-1] + 1
    again = numpy_route(other, real_GS, slots, normalize)
    for a, b in zip(route, again, strict=True):
        np.testing.assert_array_equal(a[:, :num_real], b[:, :num_real])


@given(cases(), st.sampled_from(["before_capacity", "after_drop"]))
@settings(max_examples=40, deadline=None)
def test_weights_and_loads_add_up(case, normalize):
    logits_GSE, real_GS, slots = case
    route = numpy_route(logits_GSE, real_GS, slots, normalize)
    assert (route.weight_GSK[~route.kept_GSK] == 0).all()
    total_GS = route.weight_GSK.sum(axis=-1)
    assert (total_GS <= 1 + 1e-6).all()
    full_GS = route.kept_GSK.all(axis=-1)
    if normalize == "after_drop":
        # A lone survivor whose probability is around 1e-9 is held down by the guard.
        full_GS |= route.kept_GSK[..., 0]
    np.testing.assert_allclose(total_GS[full_GS], 1, atol=1e-5)

    probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    found = jitted_summary(route, logits_GSE, probs_GSE, real_GS)
    num_real = real_GS.sum()
    for name in ("wanted_E", "first_E", "served_3"):
        np.testing.assert_allclose(np.sum(found[name]), float(num_real > 0), atol=1e-5)
    kept = float(np.dot(found["served_3"], [0, 1, 2])) * num_real
    np.testing.assert_allclose(kept, route.kept_GSK.sum(), rtol=1e-4)
