"""Devices that compute wrongly, found by computing twice and by comparing copies.

A chip that flips a bit now and then raises no error: its numbers go into the sums of all devices,
and the run is worth less from there on. Two checks, both off by default, name the device. A replay
(`guard.replay_steps`) runs one step a second time from a copy of the state; the same program on the
same devices gives the same bits. A comparison of replicas (`guard.replica_steps`) takes arrays that
several devices hold a copy of.

Every device adds up the bits of its own parts, so what is sent and compared are two numbers per
array and device.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli.config.guard import Guard
from glamcli.config.settings import is_due
from glamcli.errors import TrainError, first_of
from glamcli.model.digest import content_sums
from glamcli.named_leaves import named_leaves
from glamcli.train.state import State

_SHOWN = 4

_Step = Callable[[State, Any], tuple[State, Any]]


class Checked:
    """Compiled steps that are checked as often as `guard` says. The state is donated to them."""

    def __init__(
        self, program: Callable[[int], _Step], guard: Guard, mesh: Mesh, name: Callable[[int], str]
    ):
        """`program` is, by the number of a step, (state, batch) -> (state, sums); `name` is that
        of a process."""
        self._program, self._guard, self._mesh, self._name = program, guard, mesh, name
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
        self._sums = PartSums(mesh)

    def __call__(self, number: int, state: State, batch: Any) -> tuple[State, Any]:
        """The step with this number.

        Raises: TrainError naming the devices that computed or hold other bits than they should.
        """
        if not is_due(number, self._guard.replay_steps):
            after, sums = self._program(number)(state, batch)
        else:
            kept = self._copy(state)
            after, sums = self._program(number)(state, batch)
            self._compare_replay(number, after, kept, batch)
        if is_due(number, self._guard.replica_steps):
            self._compare_replicas(number, after)
        return after, sums

    def _compare_replay(self, number: int, after: State, before: State, batch: Any) -> None:
        first = self._sums(after)
        again, _ = self._program(number)(before, batch)
        differs = np.any(first != self._sums(again), axis=-1)
        odd = {
            place: [name for name, here in zip(named_leaves(after), row, strict=True) if here]
            for place, row in enumerate(differs)
            if row.any()
        }
        self._refuse(odd, f"step {number}, computed twice, gave different bits on")

    def _compare_replicas(self, number: int, state: State) -> None:
        sums, devices = self._sums(state), self._mesh.devices.flatten().tolist()
        odd: dict[int, list[str]] = defaultdict(list)
        for index, (name, leaf) in enumerate(named_leaves(state).items()):
            copies: dict[str, list[int]] = defaultdict(list)
            where = leaf.sharding.devices_indices_map(leaf.shape)
            for place, device in enumerate(devices):
                copies[str(where[device])].append(place)
            for places in copies.values():
                for which in _not_of_majority([tuple(sums[each, index]) for each in places]):
                    odd[places[which]].append(name)
        self._refuse(odd, f"copies of the same arrays differ after step {number}, those of")

    def _refuse(self, odd: Mapping[int, list[str]], what: str) -> None:
        if not odd:
            return
        devices = [self._mesh.devices.flat[place] for place in sorted(odd)]
        named = [f"{device} of {self._name(device.process_index)}" for device in devices]
        arrays = sorted({name for names in odd.values() for name in names})
        where, which = (", ".join(first_of(texts, _SHOWN)) for texts in (named, arrays))
        raise TrainError(
            f"{what} {where}, in {which}",
            hint="leave that device out; the same command then goes on from the last checkpoint",
        )


class PartSums:
    """Two sums over the bits of what every device holds of every array of a tree."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._compiled: Any = None

    def __call__(self, tree: Any) -> np.ndarray:
        """uint32 [devices in the order of the mesh, arrays, 2], the same in all processes, which
        must all call this alike."""
        if self._compiled is None:
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
            split = jax.shard_map(
                lambda parts: jnp.stack([content_sums(part) for part in jax.tree.leaves(parts)])[
                    None
                ],
                mesh=self._mesh,
                in_specs=(specs,),
                out_specs=PartitionSpec(self._mesh.axis_names),
                check_vma=False,
            )
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            self._compiled = jax.jit(split, out_shardings=everywhere)
        return np.asarray(jax.device_get(self._compiled(tree)))


def _not_of_majority(copies: list[tuple[int, ...]]) -> list[int]:
    """Which of them differ from the most frequent one; all when there is none."""
    counts = {copy: copies.count(copy) for copy in copies}
    most = max(counts.values())
    common = [copy for copy, count in counts.items() if count == most]
    if len(common) > 1:
        return list(range(len(copies)))
    return [number for number, copy in enumerate(copies) if copy != common[0]]
