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


def test_a_pipeline_gathers_split_weights_on_every_tick():
    few, few_ticks = guessed(*STAGED, "pipeline.microbatches=8")
    many, many_ticks = guessed(*STAGED, "pipeline.microbatches=32")
    grown = many.network["dense weights"] / few.network["dense weights"]
    assert grown == pytest.approx(many_ticks / few_ticks)
    assert many.compute_seconds < few.compute_seconds, "less of the time is bubble"


def test_gradients_of_weights_kept_whole_are_summed_on_every_tick():
    split, _ = guessed(*STAGED, "pipeline.microbatches=16")
    whole, ticks = guessed(*STAGED, "pipeline.microbatches=16", "mesh.rules.embed=[]")
    again, more = guessed(*STAGED, "pipeline.microbatches=32", "mesh.rules.embed=[]")
    assert whole.bytes["weights"] > 10 * split.bytes["weights"]
    grown = again.network["dense weights"] / whole.network["dense weights"]
    assert grown == pytest.approx(more / ticks)


def test_a_stage_works_on_one_microbatch_at_a_time():
    flat, _ = guessed("mesh.data=128", "mesh.model=8")
    staged, _ = guessed(*STAGED, "pipeline.microbatches=32")
    assert staged.bytes[TEMPORARIES] < 1.5 * flat.bytes[TEMPORARIES]
