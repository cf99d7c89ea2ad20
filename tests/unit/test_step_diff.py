"""What differs between two saved steps."""

import math

import jax.numpy as jnp
import pytest

from glamcli import step_diff
from glamcli.checkpoint import Checkpoints
from glamcli.errors import DamagedCheckpoint
from glamcli.progress import Silent
from glamcli.step_diff import ArrayDifference, diff_steps
from glamcli.stored_arrays import read_array

IDENTITY = {
    "recipe": {"seed": 0, "train": {"steps": 4}},
    "versions": {"jax": "1"},
    "topology": {"platform": "cpu"},
    "data": {"tokenizer": "t", "history": {"stages": []}},
}


def save(folder, step, state, **identity):
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, state, {**IDENTITY, **identity})
    checkpoints.close()
    return folder.absolute() / str(step)


def test_settings_software_data_and_arrays_are_compared(tmp_path):
    same = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    first = {"same": same, "one": jnp.array([3.0, 4.0]), "shape": jnp.zeros(2), "a": jnp.zeros(1)}
    second = {"same": same, "one": jnp.array([3.0, 4.5]), "shape": jnp.zeros(3), "b": jnp.zeros(1)}
    a = save(tmp_path / "a", 1, first)
    recipe = {"seed": 1, "train": {"steps": 4}, "new": True}
    b = save(tmp_path / "b", 2, second, recipe=recipe, versions={"jax": "2"})
    found = diff_steps(a, b, Silent())
    assert found.num_equal == 1
    assert found.arrays == [ArrayDifference("one", [2], 1, 0.5, pytest.approx(0.1))]
    assert found.others == [
        ("a", ["float32", [1]], None),
        ("b", None, ["float32", [1]]),
        ("shape", ["float32", [2]], ["float32", [3]]),
    ]
    assert found.facts == {
        "step": [("step", 1, 2)],
        "recipe": [("new", None, True), ("seed", 0, 1)],
        "versions": [("jax", "1", "2")],
        "topology": [],
        "data": [],
    }


def test_the_largest_relative_differences_come_first_and_those_that_are_not_finite_before(tmp_path):
    first = {
        "nan": jnp.array([1.0, 2.0]),
        "both": jnp.array([math.nan, 2.0]),
        "large": jnp.array([1.0]),
        "small": jnp.array([1000.0]),
        "from_zero": jnp.array([0.0]),
        "count": jnp.array(2**31 - 1),
        "half": jnp.array([1.0], jnp.bfloat16),
    }
    second = {
        "nan": jnp.array([1.0, math.nan]),
        "both": jnp.array([math.nan, 2.0]),
        "large": jnp.array([2.0]),
        "small": jnp.array([1001.0]),
        "from_zero": jnp.array([1.0]),
        "count": jnp.array(2**31 - 2),
        "half": jnp.array([1.5], jnp.bfloat16),
    }
    steps = save(tmp_path / "a", 1, first), save(tmp_path / "b", 1, second)
    found = diff_steps(*steps, Silent())
    names = [each.name for each in found.arrays]
    assert names == ["nan", "from_zero", "large", "half", "small", "count"]
    assert [each.num_different for each in found.arrays] == [1] * 6
    assert math.isnan(found.arrays[0].max_abs)
    assert found.num_equal == 1


def test_a_description_that_cannot_be_compared_is_an_error_that_names_its_folder(tmp_path):
    a = save(tmp_path / "a", 1, {"x": jnp.zeros(2)})
    b = save(tmp_path / "b", 1, {"x": jnp.zeros(2)}, recipe=5)
    with pytest.raises(DamagedCheckpoint, match=r"b/1: its description .* cannot be used"):
        diff_steps(a, b, Silent())


def test_only_arrays_whose_digests_differ_are_read(tmp_path, monkeypatch):
    a = save(tmp_path / "a", 1, {"x": jnp.zeros(2), "y": jnp.zeros(2)})
    b = save(tmp_path / "b", 1, {"x": jnp.zeros(2), "y": jnp.ones(2)})
    read = []
    monkeypatch.setattr(
        step_diff, "read_array", lambda folder, name: read.append(name) or read_array(folder, name)
    )
    found = diff_steps(a, b, Silent())
    assert (found.num_equal, [each.name for each in found.arrays]) == (1, ["y"])
    assert read == ["y", "y"]
