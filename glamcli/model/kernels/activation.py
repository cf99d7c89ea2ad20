"""The experts' activation and its slope, as every form of the experts applies them.

Relu's result tells its slope, so nothing is computed twice; gelu needs its argument.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Activation = Literal["relu", "gelu"]


def keep(act: Activation, raw: Array) -> Array:
    """What the forward pass keeps of the activation's argument for the backward pass."""
    return jax.nn.relu(raw) if act == "relu" else raw


def activate(act: Activation, kept: Array) -> Array:
    """The activation, from what was kept."""
    return kept if act == "relu" else jax.nn.gelu(kept, approximate=True)


def slope(act: Activation, kept: Array, dh: Array) -> Array:
    """The gradient of the activation's argument, in float32."""
    if act == "relu":
        return jnp.where(kept > 0, dh, 0.0)
    gelu = functools.partial(jax.nn.gelu, approximate=True)
    return jax.vjp(gelu, kept.astype(jnp.float32))[1](dh)[0]
