"""Alarms of routers: what they say, when they come, and that they come once."""

import json
import math

import pytest

from glamcli.config.load import load_recipe
from glamcli.train.router_alarms import RouterAlarms

E = 4
IDEAL = {
    "max_first_frac": 1 / E,
    "dropped_first_frac": 0.0,
    "dropped_second_frac": 0.0,
    "router_entropy_nats": math.log(E),
    "balance": 1.0,
    "load": [1 / E] * E,
}


def alarms(mean_steps=1, saved=None, **limits):
    sets = [f"guard.routers.{name}={json.dumps(limit)}" for name, limit in limits.items()]
    recipe = load_recipe(
        "test-tiny", [f"moe.num_experts={E}", f"guard.routers.mean_steps={mean_steps}", *sets]
    ).recipe
    return RouterAlarms(recipe, saved or {})


def step(**second):
    """The summary of a step whose first expert layer is ideal, and its second but for `second`."""
    layers = {name: [ideal, second.get(name, ideal)] for name, ideal in IDEAL.items()}
    return {f"{name}_by_layer": values for name, values in layers.items()}


TROUBLE = {
    "max_first_frac": (
        0.9,
        "the most popular expert of 4 gets 90% of first choices, in the mean of steps; "
        "raise `moe.balance_coef` (now 0.01); "
        "the limit is `guard.routers.first_frac` (0.5)",
    ),
    "load": (
        [0.0, 0.9, 0.1, 0.0],
        "2 of 4 experts get hardly a token (1, 4); raise `moe.balance_coef` (now 0.01); "
        "the limit is `guard.routers.starving_frac` (0.1)",
    ),
    "dropped_first_frac": (
        0.5,
        "50% of first choices are dropped; raise `moe.capacity_factor` (now 2) or "
        "`moe.balance_coef` (now 0.01); the limit is `guard.routers.dropped_first_frac` (0.3)",
    ),
    "dropped_second_frac": (
        0.8,
        "80% of second choices are dropped; raise `moe.capacity_factor` (now 2) or "
        "`moe.balance_coef` (now 0.01); the limit is `guard.routers.dropped_second_frac` (0.7)",
    ),
    "router_entropy_nats": (
        0.01 * math.log(E),
        "the entropy of the router is 1.0% of ln 4; raise `moe.router_z_coef` (now 0) or lower "
        "`optimizer.learning_rate`; the limit is `guard.routers.entropy_frac` (0.02)",
    ),
    "balance": (
        3.0,
        "the balance loss is 3, and 1 is ideal; raise `moe.balance_coef` (now 0.01); "
        "the limit is `guard.routers.balance` (2)",
    ),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_an_alarm_names_the_layer_the_limit_and_the_knob(name):
    value, words = TROUBLE[name]
    summary = step(**{name: value})
    assert alarms().notice(summary) == [f"expert layer 2: {words}"]
    assert summary["router_alarms"] == 1


def test_a_balanced_router_raises_no_alarm():
    summary = step()
    assert (alarms().notice(summary), summary["router_alarms"]) == ([], 0)


def test_a_limit_of_null_is_never_looked_at():
    assert alarms(balance=None).notice(step(balance=4.0)) == []


def test_one_bad_step_is_no_alarm_and_many_are():
    watched = alarms(mean_steps=10)
    assert watched.notice(step(max_first_frac=1.0)) == []
    came = [bool(watched.notice(step(max_first_frac=1.0))) for _ in range(20)]
    assert came.index(True) == 2  # 1 - 0.75 x 0.9^4 is above a half
    assert sum(came) == 1, "it is said once"


def test_an_alarm_that_plays_about_its_limit_is_said_once_until_it_has_gone():
    watched = alarms()
    shares = (0.51, 0.49, 0.51, 0.41, 0.9, 0.4, 0.45, 0.51)
    summaries = [step(max_first_frac=share) for share in shares]
    said = [len(watched.notice(summary)) for summary in summaries]
    assert said == [1, 0, 0, 0, 0, 0, 0, 1]
    assert [each["router_alarms"] for each in summaries] == [1, 1, 1, 1, 1, 0, 0, 1]


def test_steps_that_are_not_finite_change_no_mean():
    watched = alarms()
    watched.notice(step(balance=3.0))
    gone = step(balance=None, load=[None] * E)
    assert watched.notice(gone) == []
    assert gone["router_alarms"] == 1


def test_a_resumed_run_raises_the_alarms_of_an_uninterrupted_one():
    steps = [{"balance": 1.0 + index / 10, "load": [0.4, 0.4, 0.2, 0.0]} for index in range(40)]
    watched, said = alarms(mean_steps=7), []
    for index, values in enumerate(steps):
        said.append(watched.notice(step(**values)))
        if index == 17:
            saved = json.loads(json.dumps(watched.saved()))
    assert sum(map(len, said)) == 2
    again = alarms(mean_steps=7, saved=saved)
    assert [again.notice(step(**values)) for values in steps[18:]] == said[18:]


def test_a_dense_model_has_no_alarms():
    watched, summary = RouterAlarms(load_recipe("test-tiny", ["moe=null"]).recipe, {}), {}
    assert (watched.notice(summary), summary) == ([], {})
