"""A few numbers of every process, exchanged once per step without waiting for any of them.

A tiny program after each step gathers them; like the numbers of the step itself they are read one
step late. So all processes know the same things at the same step (docs/decisions/0008).
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Pulse:
    """The exchange of some numbers per process; a single process gets its own back at once."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.process_count() == 1:
            return
        devices = jax.devices()
        mesh = Mesh(np.array(devices), ("device",))
        self._each = NamedSharding(mesh, PartitionSpec("device"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        # The first device of every process stands for it.
        first = {device.process_index: number for number, device in reversed([*enumerate(devices)])}
        self._first_rows = [first[process] for process in sorted(first)]
        self._gather = jax.jit(lambda x: x, out_shardings=everywhere)

    def beat(self, *mine: float) -> np.ndarray | None:
        """Sends `mine`; returns [processes, numbers] of all processes at the last beat.

        None at the first beat. Every process must call this the same number of times.
        """
        row = np.array([mine], np.float32)
        if jax.process_count() == 1:
            return row
        shape = (jax.device_count(), len(mine))
        sent = jax.make_array_from_callback(shape, self._each, lambda _: row)
        previous, self._pending = self._pending, self._gather(sent)
        return None if previous is None else np.asarray(previous)[self._first_rows]
