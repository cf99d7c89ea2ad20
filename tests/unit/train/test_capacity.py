"""Capacity factors follow what routers drop, and a run that is killed anywhere follows alike."""

import functools
import json
import random
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.config.load import load_recipe
from glamcli.progress import Silent
from glamcli.train import loop
from glamcli.train.capacity import LAG, Capacity, CapacityStage, factor_within
from glamcli.train.loop import train
from runs import metrics, weights

FACTORS = (1.0, 1.5, 2.0)
STEPS = 12


@pytest.mark.parametrize(
    ("dropped", "now", "expected"),
    [
        ((0.5, 0.3, 0.1), 2.0, 2.0),  # the largest is within the limit, no other is
        ((0.5, 0.2, 0.1), 2.0, 2.0),  # 1.5 is, but hardly: above 0.8 of the limit
        ((0.5, 0.16, 0.1), 2.0, 1.5),
        ((0.1, 0.05, 0.0), 2.0, 1.0),  # two down at once
        ((0.5, 0.2, 0.1), 1.5, 1.5),  # in force it stays up to the limit itself
        ((0.5, 0.21, 0.1), 1.5, 2.0),
        ((0.21, 0.1, 0.0), 1.0, 1.5),
        ((0.9, 0.8, 0.7), 1.0, 2.0),  # the largest where none is within it
        ((0.9, 0.8, 0.7), 2.0, 2.0),
    ],
)
def test_the_smallest_factor_within_the_limit_is_chosen(dropped, now, expected):
    assert factor_within(FACTORS, dropped, now, 0.2) == expected


drops = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(lambda d: sorted(d, reverse=True))


@given(drops, st.sampled_from(FACTORS), st.floats(0, 0.999))
def test_a_choice_keeps_to_the_limit_and_is_not_taken_back(dropped, now, limit):
    chosen = factor_within(FACTORS, dropped, now, limit)
    within = [frac <= limit for frac in dropped]
    assert within[FACTORS.index(chosen)] or chosen == FACTORS[-1]
    assert chosen <= now or not within[FACTORS.index(now)]
    assert factor_within(FACTORS, dropped, chosen, limit) == chosen


@functools.cache
def with_factors():
    adaptive = {"lower_factors": FACTORS[:-1], "max_dropped_frac": 0.2, "mean_steps": 3}
    return load_recipe("test-tiny", [f"moe.adaptive_capacity={json.dumps(adaptive)}"]).recipe


def capacity(saved=None):
    return Capacity(with_factors(), saved or {})


def sums(*dropped_F, bad_steps=0):
    """Of a step with two expert layers, the first of which drops nothing."""
    return {"bad_steps": bad_steps, "routing": {"dropped_F": np.array([(0, 0, 0), dropped_F])}}


def test_a_factor_is_that_of_the_worst_layer_in_the_mean_and_holds_two_steps_later():
    followed, summary = capacity(), {}
    assert not followed.notice(1, sums(0.0, 0.0, 0.0), summary)
    assert not followed.notice(2, sums(1.0, 1.0, 1.0, bad_steps=1), summary)  # does not count
    assert not followed.notice(3, sums(0.3, 0.15, 0.0), summary)
    switch = followed.notice(4, sums(0.6, 0.15, 0.0), summary)
    assert switch["capacity_switch"] == {
        "from_step": 6,
        "factor": 1.5,
        "dropped_frac": pytest.approx(0.1),
    }
    assert summary == {"capacity_factor": 2.0}
    assert [followed.at(step) for step in (1, 5, 6, 100)] == [2.0, 2.0, 1.5, 1.5]
    # Each further step moves the mean by a third: 0.1 -> 0.2 -> 0.25.
    assert not followed.notice(5, sums(1.0, 0.4 - 1e-9, 0.0), summary)
    assert followed.notice(6, sums(1.0, 0.35, 0.0), summary)
    assert followed.stages == [(1, 2.0), (6, 1.5), (8, 2.0)]


@pytest.mark.parametrize("seed", range(3))
def test_saved_at_any_step_it_goes_on_as_if_never_saved(seed):
    rng = random.Random(seed)
    steps = [sums(*sorted((rng.random() / 3 for _ in FACTORS), reverse=True)) for _ in range(60)]
    whole, saved, in_force = capacity(), [], []
    for step, each in enumerate(steps, 1):
        in_force.append(whole.at(step + 1))  # what is dispatched before this step is read
        whole.notice(step, each, {})
        saved.append(json.dumps(whole.saved()))
    assert len(whole.stages) > 2
    assert in_force == [whole.at(step + 1) for step in range(1, len(steps) + 1)]
    for cut in range(1, len(steps)):
        resumed = capacity(json.loads(saved[cut - 1]))
        assert [resumed.at(cut + n) for n in (1, LAG)] == [whole.at(cut + n) for n in (1, LAG)]
        for step, each in enumerate(steps[cut:], cut + 1):
            resumed.notice(step, each, {})
        assert (resumed.stages, json.dumps(resumed.saved())) == (whole.stages, saved[-1])


@pytest.fixture
def recipe(tmp_path):
    """Text of many characters, and from the fourth step to the seventh of a single one: all
    tokens go to the same experts."""
    words = (" ".join(f"{i * k:x}" for k in range(1, 9)) for i in range(400))
    (tmp_path / "many.txt").write_text("\n".join(words))
    (tmp_path / "one.txt").write_text("\n".join("a" * (500 + i) for i in range(100)))
    (tmp_path / "mix.yaml").write_text(
        "sources:\n"
        "  many: {kind: text, path: many.txt, separator: line, weight: 1}\n"
        "  one: {kind: text, path: one.txt, separator: line, weight: 0}\n"
        "heldout_frac: 0\n"
        "stages:\n"
        "  - {from_step: 3, weights: {one: 1}}\n"
        "  - {from_step: 7, weights: {many: 1}}\n"
    )
    adaptive = {"lower_factors": [3.0], "max_dropped_frac": 0.2, "mean_steps": 1}
    sets = (
        *("model.model_dim=16", "model.ffn_dim=16", "model.num_heads=1", "batch.row_tokens=32"),
        *("model.vocab_size=260", "moe.group_tokens=32", "moe.capacity_factor=4"),
        f"moe.adaptive_capacity={json.dumps(adaptive)}",
        *(f"train.steps={STEPS}", "every.heldout_steps=null", "every.log_steps=4"),
        *("every.checkpoint_steps=1", "checkpoints.keep=100", "mesh.data=2"),
        *(f"data.mixture={tmp_path}/mix.yaml", f"data.cache_dir={tmp_path}/cache"),
    )
    compiled = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in compiled}
    for name, value in compiled.items():
        jax.config.update(name, value)
    yield load_recipe("test-tiny", sets).recipe
    for name, value in before.items():
        jax.config.update(name, value)


def test_killed_at_any_switch_a_run_repeats_it_bit_for_bit(recipe, tmp_path, monkeypatch):
    make_mesh = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
    train(recipe, tmp_path / "whole", Silent())
    lines = metrics(tmp_path / "whole")
    switches = [line["capacity_switch"] for line in lines if "capacity_switch" in line]
    assert [each["factor"] for each in switches] == [3.0, 4.0, 3.0]  # down, up, and down again
    stages = [
        CapacityStage(1, 4.0),
        *(CapacityStage(s["from_step"], s["factor"]) for s in switches),
    ]
    for line in lines:
        if "loss" in line:
            in_force = [each.factor for each in stages if each.from_step <= line["step"]]
            assert line["capacity_factor"] == in_force[-1]
    expected = weights(tmp_path / "whole", STEPS)
    later = recipe.every.model_copy(update={"checkpoint_steps": None})
    # Saved when a switch is decided, before its first step, and after it.
    first, second, _ = (each["from_step"] for each in switches)
    for step in (first - 2, first - 1, second):
        folder = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole", folder)
        for number in range(step + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / str(number))
        train(recipe.model_copy(update={"every": later}), folder, Silent())
        found = weights(folder, STEPS)
        assert not [n for n in expected if expected[n].tobytes() != found[n].tobytes()]
        assert metrics(folder) == lines
