"""Matrix products of a traced program: every operation that the hardware will execute.

Counted before compiling, so nothing depends on how a compiler names its fusions: recomputed
activations, the one-hot products of einsum dispatch and empty slots of experts are all there.
"""

from __future__ import annotations

import math
from typing import Any


def matrix_flops(jaxpr: Any, num_devices: int) -> float:
    """Operations of all matrix products on all devices; a multiplication and an addition are two.

    A loop of unknown length counts as one round; of a conditional the dearest branch counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[dim] for dim in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += max(matrix_flops(branch, num_devices) for branch in params["branches"])
        else:
            times = params.get("length", 1) if name == "scan" else 1
            # The body of a mapped function speaks of one device's part.
            times *= num_devices if name == "shard_map" else 1
            # Whatever the operation calls them; rules for gradients are no part of what runs.
            inner = [value for value in params.values() if hasattr(value, "eqns")]
            total += times * sum(matrix_flops(each, num_devices) for each in inner)
    return total
