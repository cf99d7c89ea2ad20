"""Arithmetic of a step's memory and time, by laws it must keep; nothing is compiled."""

import pytest

from glamcli.config.load import load_recipe
from glamcli.config.pipeline import schedule
from glamcli.parallel.mesh import mesh_shape
from glamcli.plan import topology
from glamcli.plan.formula import Estimate, estimate
from glamcli.plan.memory import state_bytes
from glamcli.plan.network import Network

V4 = topology.parse("v4-2048", topology.load_chips())
STAGED = ("mesh.stage=8", "mesh.data=16", "mesh.model=8")
TEMPORARIES = "activations and temporaries"


def guessed(*sets: str) -> tuple[Estimate, int]:
    """What arithmetic says of the dense 137B on 1,024 chips, and the ticks of its pipeline."""
    recipe = load_recipe("glam_137b", sets).recipe
    shape = mesh_shape(recipe.mesh, V4.num_devices)
    found = estimate(recipe, state_bytes(recipe, shape), Network(V4, None, shape))
    stages = schedule(recipe)
    return found, 1 if stages is None else stages.ticks


@pytest.mark.parametrize("embed", [(), ("mesh.rules.embed=[]",)], ids=["split", "whole"])
def test_a_pipeline_gathers_weights_and_sums_their_gradients_once(embed):
    few, _ = guessed(*STAGED, *embed, "pipeline.microbatches=8")
    many, _ = guessed(*STAGED, *embed, "pipeline.microbatches=32")
    assert many.network["dense weights"] == few.network["dense weights"] > 0
    assert many.compute_seconds < few.compute_seconds, "less of the time is bubble"


def test_what_is_split_over_the_experts_axis_is_gathered_on_every_tick():
    over_experts = ("mesh.stage=8", "mesh.data=1", "mesh.expert=16", "mesh.model=8")
    few, few_ticks = guessed(*over_experts, "pipeline.microbatches=8")
    many, many_ticks = guessed(*over_experts, "pipeline.microbatches=32")
    grown = many.network["dense weights"] / few.network["dense weights"]
    assert grown == pytest.approx(many_ticks / few_ticks)


def test_a_stage_works_on_one_microbatch_at_a_time():
    flat, _ = guessed("mesh.data=128", "mesh.model=8")
    staged, _ = guessed(*STAGED, "pipeline.microbatches=32")
    weights = 137e9 / (8 * 8)  # of which every data shard has a copy, and gradients twice
    assert staged.bytes[TEMPORARIES] < 1.5 * flat.bytes[TEMPORARIES] + 10.5 * weights
