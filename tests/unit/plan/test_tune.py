"""Flags of the TPU compiler, tried on a step: alone, together, left out, and as lines to paste."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli import libtpu
from glamcli.config.chips import load_chips
from glamcli.config.load import load_recipe
from glamcli.config.xla_flags import tunable_flags
from glamcli.errors import PlanError, RecipeError
from glamcli.plan import compile, topology, tune
from glamcli.plan.cost import Prices
from glamcli.plan.planner import make_plan

CHIPS = load_chips()
GATHER, COUNT, SPACE = (
    "xla_enable_async_all_gather",
    "xla_jf_crs_combiner_threshold_count",
    "xla_tpu_scheduler_percent_shared_memory_limit",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture
def saved(monkeypatch) -> dict[str, float]:
    """Seconds of a step of 10 s that each flag saves; those of negative seconds do not fit."""
    seconds = {}
    base = make_plan(
        load_recipe("quickstart").recipe, topology.parse_target("8xh100", CHIPS), Prices()
    )

    def planned(recipe, target, prices):
        del target, prices
        gains = [seconds.get(name, 0.0) for name in recipe.runtime.xla_flags]
        if any(gain < 0 for gain in gains):
            raise PlanError("the step needs 41.2 GiB per chip")
        time = dataclasses.replace(base.time, compute=7.0, exposed={"data": 3.0 - sum(gains)})
        sent = [("all-gather", ("data",), 1, 1), ("all-reduce", ("data",), 1, 1)]
        return dataclasses.replace(base, time=time, collectives=sent)

    monkeypatch.setattr(tune, "make_plan", planned)
    return seconds


def tried(*sets: str, target: str = "v4-8") -> list[tune.Trial]:
    recipe = load_recipe("test-tiny", sets).recipe
    devices = topology.parse_target(target, CHIPS)
    return list(tune.tune(recipe, devices, Prices(), lambda _: None))


def test_flags_that_help_are_tried_together_the_best_first(saved):
    saved.update({GATHER: 1.0, COUNT: 0.5, SPACE: 0.001})
    trials = tried()
    assert [set(trial.settings) for trial in trials if trial.plan][-1] == {GATHER, COUNT}
    best, second, *_ = tune.ranked(trials)
    assert (best.settings, best.seconds) == ({GATHER: True, COUNT: 10}, 8.5)
    assert second.settings == {GATHER: True}
    lines = tune.recipe_lines(best, "chosen by a test")
    assert lines[:2] == ["runtime:", "  xla_flags: # chosen by a test"]
    assert lines[2].startswith(f"    {GATHER}: true # weights are gathered")


def test_flags_that_cannot_help_or_do_not_fit_are_left_out_with_the_reason(saved):
    saved[COUNT] = -1.0
    trials = tried(f"runtime.xla_flags.{SPACE}=90")
    why = {trial.words.partition("=")[0]: trial.why for trial in trials if trial.plan is None}
    assert why == {
        "xla_tpu_enable_async_all_to_all": "the step has no all-to-all",
        COUNT: "the step needs 41.2 GiB per chip",
        SPACE: "the recipe sets it",
    }
    assert not tune.ranked(trials)[0].flags, "no flag saves anything"


def test_flags_known_to_be_wrong_on_a_chip_are_never_tried():
    names = {kind: {flag.name for flag in tunable_flags(kind)} for kind in CHIPS}
    fused = "xla_tpu_enable_async_collective_fusion"
    assert [kind for kind in CHIPS if fused in names[kind]] == ["v5e"]
    assert GATHER in names["v4"]
    assert not names["h100"]


def test_only_the_tpu_compiler_is_tuned():
    with pytest.raises(PlanError, match="`--tune` tries flags of the TPU compiler"):
        tried(target="8xh100")


@needs_libtpu
def test_a_flag_changes_the_schedule_and_an_unknown_one_is_refused():
    libtpu.quiet()
    target = topology.parse_target("v4-8", CHIPS)
    mesh = Mesh(np.array(topology.devices(target)), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    x, w = (jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=split) for _ in "xw")
    run = jax.jit(lambda x, w: jnp.tanh(x @ x.T) @ w, out_shardings=split)
    lowered = run.lower(x, w)
    _, plain = compile._compiled(lowered, target, {})
    _, tuned = compile._compiled(lowered, target, {GATHER: True})
    assert "all-gather-start" not in plain
    assert "all-gather-start" in tuned
    with pytest.raises(RecipeError, match="xla_no_such_flag") as caught:
        compile._compiled(lowered, target, {"xla_no_such_flag": True})
    assert caught.value.exit_code == 2
