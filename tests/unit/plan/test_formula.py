"""Arithmetic of a step's memory and time, by laws it must keep; nothing is compiled."""

import pytest

from glamcli.config.chips import load_chips
from glamcli.config.load import load_recipe
from glamcli.config.stages import schedule
from glamcli.parallel.mesh import mesh_shape
from glamcli.plan import topology
from glamcli.plan.formula import Estimate, estimate
from glamcli.plan.memory import state_bytes
from glamcli.plan.network import Network

V4 = topology.parse_target("v4-2048", load_chips())
STAGED = ("mesh.stage=8", "mesh.data=16", "mesh.model=8")
TEMPORARIES = "activations and temporaries"


def guessed(*sets: str, name: str = "glam_137b") -> tuple[Estimate, int]:
    """What arithmetic says of a recipe on 1,024 chips, and the ticks of its pipeline."""
    recipe = load_recipe(name, sets).recipe
    shape = mesh_shape(recipe.mesh, V4.num_devices)
    found = estimate(recipe, state_bytes(recipe, shape), Network(V4, None, shape))
    stages = schedule(recipe)
    return found, 1 if stages is None else stages.ticks


@pytest.mark.parametrize("embed", [(), ("mesh.rules.embed=[]",)], ids=["split", "whole"])
def test_a_pipeline_gathers_weights_and_sums_their_gradients_once(embed):
    few, _ = guessed(*STAGED, *embed, "pipeline.microbatches=8")
    many, _ = guessed(*STAGED, *embed, "pipeline.microbatches=32")
    assert many.time.exposed["dense weights"] == few.time.exposed["dense weights"] > 0
    assert many.time.compute < few.time.compute, "less of the time is bubble"


def test_what_is_split_over_the_experts_axis_stays_so_and_is_gathered_on_every_tick():
    mesh = ("mesh.stage=8", "mesh.data=2", "mesh.expert=64", "batch.rows=2048")
    few, few_ticks = guessed(*mesh, "pipeline.microbatches=8", name="glam_8b_64e")
    many, many_ticks = guessed(*mesh, "pipeline.microbatches=16", name="glam_8b_64e")
    grown = many.time.exposed["dense weights"] / few.time.exposed["dense weights"]
    assert 1 < grown < many_ticks / few_ticks, "data gathers once"
    over_data = (*mesh, "mesh.rules.embed=[data]", "pipeline.microbatches=8")
    copied, _ = guessed(*over_data, name="glam_8b_64e")
    more = copied.bytes[TEMPORARIES] - few.bytes[TEMPORARIES]
    dense = 2 * (2 * 4 * 4096 * 4096 + 3 * 4096 * 16384)  # of a stage's two pairs of layers
    assert more == pytest.approx(10 * dense * 63 / 64, rel=0.3)


@pytest.mark.parametrize(
    ("sets", "compiled_gib"),
    [
        ((), 16.66),
        (("mesh.data=1", "mesh.model=16"), 15.3),
        (("mesh.data=8", "mesh.model=2"), 23.3),
    ],
)
def test_bytes_are_near_those_of_compiled_layouts(sets, compiled_gib):
    found, _ = guessed(*sets, name="glam_64b_64e")
    assert found.total_bytes / 2**30 == pytest.approx(compiled_gib, rel=0.2)


def test_a_stage_works_on_one_microbatch_at_a_time():
    flat, _ = guessed("mesh.data=128", "mesh.model=8")
    staged, _ = guessed(*STAGED, "pipeline.microbatches=32")
    weights = 137e9 / (8 * 8)  # of which every data shard has a copy, and gradients twice
    assert staged.bytes[TEMPORARIES] < 1.5 * flat.bytes[TEMPORARIES] + 10.5 * weights
