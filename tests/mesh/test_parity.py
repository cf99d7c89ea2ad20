"""Every mesh computes what one device computes: loss, balance loss, gradients, new weights."""

import functools
from typing import get_args

import numpy as np
import pytest

from glamcli.config.devices import MeshAxis
from glamcli.config.load import load_recipe
from glamcli.config.sharding import table
from glamcli.doctor.parity import CASES, DISPATCHES, Case, Parity, _relative, small

RECIPES = {"test-tiny": DISPATCHES, "glam_0.1b": ("",)}


@functools.cache
def parity(recipe):
    return Parity(load_recipe(recipe, ["optimizer.clip_grad_norm=1.0"]).recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "case", "dispatch"),
    [
        pytest.param(
            recipe,
            case,
            dispatch,
            id=f"{case.name}-{dispatch or 'dense'}",
        )
        for recipe, dispatches in RECIPES.items()
        for case in CASES
        for dispatch in dispatches
    ],
)
def test_a_mesh_computes_what_one_device_computes(recipe: str, case: Case, dispatch: str):
    found = parity(recipe).difference(case, dispatch)
    assert found.equal, found


def test_the_meshes_use_every_axis_and_every_way_to_split_the_residual_stream():
    assert len(CASES) >= 12
    assert len({case.name for case in CASES}) == len(CASES)
    for axis in get_args(MeshAxis):
        assert sum(getattr(case.mesh, axis) > 1 for case in CASES) >= 2, axis
    assert {case.mesh.residual for case in CASES} == {"embed", "sequence", "whole"}
    assert {case.pipeline.repeats for case in CASES if case.mesh.stage > 1} == {1, 2}
    assert len({table(case.mesh) for case in CASES}) >= 5


@pytest.mark.parametrize("name", ["quickstart", "glam_64b_64e", "glam_137b"])
def test_a_small_recipe_keeps_its_switches(name):
    recipe = load_recipe(name).recipe
    few = small(recipe)
    assert few.model.model_dim < recipe.model.model_dim
    assert few.model.zero_logit == recipe.model.zero_logit
    assert few.optimizer.name == recipe.optimizer.name
    assert few.train.remat == recipe.train.remat
    assert (few.moe is None) == (recipe.moe is None)
    if few.moe is not None and recipe.moe is not None:
        assert few.moe.capacity_factor == recipe.moe.capacity_factor
        assert few.batch.rows * few.batch.row_tokens % few.moe.group_tokens == 0


def test_a_difference_is_relative_and_never_hidden():
    one = np.array([3.0, 4.0], np.float32)
    assert _relative(one, one) == 0
    assert _relative(one + np.array([0, 5e-5], np.float32), one) == pytest.approx(1e-5, rel=0.01)
    assert _relative(np.zeros(2), np.zeros(2)) == 0
    assert _relative(np.ones(1), np.zeros(1)) == 1
    assert not _relative(np.full(2, np.nan), one) <= 1
