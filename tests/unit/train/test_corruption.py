"""One bit that one of eight devices has wrong is found, and the device is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glamcli.config.guard import Guard
from glamcli.config.schema import Mesh
from glamcli.errors import TrainError
from glamcli.hosts.join import ALONE
from glamcli.parallel.mesh import make_mesh
from glamcli.train.corruption import Checked

MESH = make_mesh(Mesh(data=4, expert=2))
DEVICES = MESH.devices.flatten().tolist()
SPECS = {
    "everywhere": PartitionSpec(),
    "split": PartitionSpec(("data", "expert")),
    "copied": PartitionSpec("data"),
}


def state():
    count = jax.device_put(jnp.int32(3), NamedSharding(MESH, PartitionSpec()))
    return {"count": count} | {
        name: jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(MESH, spec))
        for name, spec in SPECS.items()
    }


def flipped(tree, name, *places):
    """The tree with the lowest bit of one number changed in what these devices hold."""
    leaf = tree[name]
    parts = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device in [DEVICES[place] for place in places]:
            part.view(np.uint32).flat[1] ^= 1
        parts.append(jax.device_put(part, shard.device))
    return tree | {name: jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)}


def doubled(state, batch):
    return {name: x * 2 for name, x in state.items()}, None


def checked(step=doubled, **guard):
    return Checked(lambda number: step, Guard(**guard), MESH, ALONE.name)


def test_only_the_steps_that_are_due_are_computed_twice():
    calls = []

    def step(state, batch):
        calls.append(batch)
        return doubled(state, batch)

    run = checked(step, replay_steps=2, replica_steps=3)
    for number in (1, 2, 3, 4):
        after, _ = run(number, state(), number)
        np.testing.assert_array_equal(after["split"], np.arange(16.0).reshape(8, 2) * 2)
    assert calls == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("name", SPECS)
def test_a_bit_that_comes_out_otherwise_the_second_time_names_device_and_array(name):
    outcomes = iter([(), (5,)])

    def step(state, batch):
        return flipped(doubled(state, batch)[0], name, *next(outcomes)), None

    with pytest.raises(TrainError) as caught:
        checked(step, replay_steps=7)(7, state(), None)
    assert caught.value.what == (
        f"step 7, computed twice, gave different bits on {DEVICES[5]} of process 0, in {name}"
    )


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("everywhere", [5], [5]),
        ("everywhere", [2, 6], [2, 6]),
        ("copied", [5], [4, 5]),
        ("split", [5], []),
    ],
    ids=["one", "two of eight", "one of two copies", "no copy"],
)
def test_a_copy_with_another_bit_is_found_and_of_two_both_are_named(name, wrong, found):
    def step(state, batch):
        return flipped(doubled(state, batch)[0], name, *wrong), None

    run = checked(step, replica_steps=10)
    run(9, state(), None)
    if not found:
        run(10, state(), None)
        return
    with pytest.raises(TrainError) as caught:
        run(10, state(), None)
    devices = ", ".join(f"{DEVICES[place]} of process 0" for place in found)
    assert caught.value.what == (
        f"copies of the same arrays differ after step 10, those of {devices}, in {name}"
    )
