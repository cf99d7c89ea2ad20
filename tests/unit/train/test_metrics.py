"""Means of a step's sums."""

import math

import pytest

from glamcli.config.guard import Guard, RouterLimits
from glamcli.config.schema import Batch, Data, Model, Moe, Recipe, Train
from glamcli.train.metrics import add_losses, summarise
from glamcli.train.router_alarms import RouterAlarms

RECIPE = Recipe(
    model=Model(num_layers=4, model_dim=8, ffn_dim=8, num_heads=1, head_dim=8, vocab_size=64),
    moe=Moe(num_experts=4),
    batch=Batch(rows=4, row_tokens=10),
    train=Train(steps=5),
    data=Data(mixture="quickstart"),
    guard=Guard(routers=RouterLimits(mean_steps=1)),
)
SUMS = {
    "step": 7,
    "loss_nats": 64.0,
    "z_sum": 10.0,
    "num_targets": 32,
    "source_nats": [60.0, 4.0, 0.0],
    "source_targets": [30, 2, 0],
    "loss": 2.1,
    "learning_rate": 0.01,
    "grad_norm": float("inf"),
    "update_norm": 0.5,
    "param_norm": 3.0,
    "deviations": [7.5, float("nan"), -1.0],
    "finite": False,
    "spike": True,
    "bad_steps": 1,
    "bad_steps_total": 2,
    "routing": {
        "balance_loss": [1.0, 1.5],
        "router_z_loss": [4.0, 1.0],
        "wanted_E": [[0.25] * 4, [0.7, 0.3, 0.0, 0.0]],
        "first_E": [[0.25] * 4, [0.9, 0.1, 0.0, 0.0]],
        "dropped_first_frac": [0.0, 0.5],
        "dropped_second_frac": [0.1, 0.3],
        "dropped_frac": [0.05, 0.4],
        "served_3": [[0.0, 0.1, 0.9], [0.2, 0.4, 0.4]],
        "router_entropy_nats": [1.2, 0.4],
        "dead_experts": [0.0, 2.0],
    },
}


def summary(sums, names="abc", before=None):
    return summarise(sums, add_losses(before or {}, sums, names), RECIPE)


def test_means_are_over_real_targets_of_all_and_of_each_source():
    got = summary(SUMS, ["web", "books", "news"])
    assert (got["step"], got["loss"], got["perplexity"]) == (7, 2.0, math.exp(2.0))
    assert (got["loss/web"], got["loss/books"], got["loss/news"]) == (2.0, 2.0, None)
    assert got["softmax_z"] == 10.0 / 32
    assert got["padding_frac"] == pytest.approx(0.2)
    assert got["grad_norm"] is None
    assert (got["spike"], got["bad_steps"], got["bad_steps_total"]) == (1, 1, 2)
    deviations = [got[f"{name}_deviations"] for name in ("loss", "grad_norm", "update_norm")]
    assert (got["update_norm"], deviations) == (0.5, [7.5, None, -1.0])


def test_losses_are_means_over_the_targets_of_several_steps():
    before = {"": (36.0, 8), "web": (36.0, 8), "gone": (1.0, 1)}
    got = summary(SUMS, ["web", "books", "news"], before)
    assert got["loss"] == 100.0 / 40
    assert got["perplexity"] == math.exp(2.5)
    assert (got["loss/web"], got["loss/books"], got["loss/news"]) == (96.0 / 38, 2.0, None)
    assert "loss/gone" not in got


def test_router_numbers_are_told_by_layer_and_as_means():
    got = summary(SUMS)
    assert (got["balance"], got["balance_by_layer"]) == (1.25, [1.0, 1.5])
    assert got["dropped_frac"] == pytest.approx(0.225)
    assert (got["dead_experts"], got["dead_experts_by_layer"]) == (2, [0, 2])
    assert got["max_first_frac_by_layer"] == [0.25, 0.9]
    assert (got["router_z"], got["router_z_by_layer"]) == (2.5, [4.0, 1.0])
    assert got["unserved_frac"] == pytest.approx(0.1)
    assert got["served_one_frac"] == pytest.approx(0.25)
    assert got["served_one_frac_by_layer"] == [0.1, 0.4]
    assert got["served_two_frac"] == pytest.approx(0.65)
    assert got["served_two_frac_by_layer"] == [0.9, 0.4]
    assert got["load_by_layer"] == [[0.25] * 4, [0.7, 0.3, 0.0, 0.0]]  # before capacity evens it


def test_a_dense_model_has_no_router_numbers():
    got = summary({**SUMS, "routing": {}})
    assert not any("balance" in name or "dropped" in name for name in got)


def test_alarms_name_the_layer_and_the_knob():
    collapse, starving, dropped = RouterAlarms(RECIPE, {}).notice(summary(SUMS))
    assert collapse.startswith(
        "expert layer 2: the most popular expert of 4 gets 90% of first choices, in the mean of "
        "steps; raise `moe.balance_coef` (now 0.01)"
    )
    assert starving.startswith("expert layer 2: 2 of 4 experts get hardly a token (3, 4); raise")
    assert dropped.startswith(
        "expert layer 2: 50% of first choices are dropped; raise `moe.capacity_factor` (now 2) "
        "or `moe.balance_coef` (now 0.01)"
    )
