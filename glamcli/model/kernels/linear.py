"""Activations times a weight, forward and backward: every dense product of the model, and the sums
over rows that are the gradients of all weights.

Weights come in as the float32 masters; products run in the dtype of the activations, and the
weight's gradient is accumulated and stays in float32 (JAX's own rule would round it to bfloat16
first).

On one CPU every product is one of two matrices. XLA's choice for operands of three dimensions is
to copy them, transposed, inside the elementwise work before the product, element by element
across memory: twice the time of a whole gated feed-forward layer, forward and backward.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout as ArrayLayout
from jax.experimental.layout import with_layout_constraint

from glamcli.parallel.axes import num_devices

einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
"""`jnp.einsum`, accumulated and returned in float32."""


def platform() -> str:
    """Where the traced program will run, by its mesh, which may only be described."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether the traced program runs on a single CPU device, where layouts are free to choose."""
    return num_devices() == 1 and platform() == "cpu"


def _linear(spec: str, x: Array, w: Array) -> Array:
    """The einsum `spec` of activations and a weight, in the dtype of x.

    In `spec` ("BSM,MND->BSND") the letters of x are batch letters, then those it shares with w;
    w has them together, at its start or at its end; the result is batch letters, then the rest.
    """
    return _product(spec, x, w.astype(x.dtype)).astype(x.dtype)


linear = jax.custom_vjp(_linear, nondiff_argnums=(0,))


def _backward(spec: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    x_letters, w_letters, y_letters = _letters(spec)
    dx = _product(f"{y_letters},{w_letters}->{x_letters}", dy, w.astype(dy.dtype))
    if on_one_cpu():
        num_batch = len(set(x_letters) & set(y_letters))
        rows = math.prod(x.shape[:num_batch])
        x_rK, dy_rN = x.reshape(rows, -1), dy.reshape(rows, -1)
        pair = (x_rK, dy_rN) if w_letters[0] in x_letters else (dy_rN, x_rK)
        dw = sum_over_rows(*pair).reshape(w.shape)
    else:
        dw = einsum32(f"{x_letters},{y_letters}->{w_letters}", x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


linear.defvjp(lambda *args: (_linear(*args), args[1:]), _backward)


def sum_over_rows(a_rK: Array, b_rN: Array) -> Array:
    """The sum over rows of outer products, [K, N] in float32; leading dimensions are a batch.

    On one CPU the first operand is copied, transposed, before such a product. So the narrower
    comes first where that and turning the result is less to move.
    """
    if not on_one_cpu():
        return einsum32("...rK,...rN->...KN", a_rK, b_rN)
    (rows, K), N = a_rK.shape[-2:], b_rN.shape[-1]
    if rows * K <= rows * N + K * N:
        return _rows_turned(a_rK, b_rN)
    return _rows_turned(b_rN, a_rK).swapaxes(-1, -2)


def _rows_turned(a_rK: Array, b_rN: Array) -> Array:
    """The first operand gets the layout that the product reads: XLA has no bfloat16 product that
    transposes it, and would convert both operands to float32. The barrier keeps a neighbour's
    transpose from being folded into the product, which would undo that."""
    layout = ArrayLayout(major_to_minor=tuple(range(a_rK.ndim)))
    a_Kr = with_layout_constraint(a_rK.swapaxes(-1, -2), layout)
    out_KN = einsum32("...Kr,...rN->...KN", a_Kr, b_rN)
    return jax.lax.optimization_barrier(out_KN)


def _product(spec: str, x: Array, w: Array) -> Array:
    """The einsum; in float32 on one CPU (where a bfloat16 result would have both operands
    converted first), elsewhere in the dtype of x."""
    if not on_one_cpu():
        return jnp.einsum(spec, x, w)
    x_letters, w_letters, y_letters = _letters(spec)
    num_batch = len(set(x_letters) & set(y_letters))
    sizes = dict(zip(x_letters, x.shape, strict=True)) | dict(zip(w_letters, w.shape, strict=True))
    contracted = math.prod(x.shape[num_batch:])
    if w_letters[0] in x_letters:
        w_2D, dim = w.reshape(contracted, -1), 0
    else:
        w_2D, dim = w.reshape(-1, contracted), 1
    dims = (((1,), (dim,)), ((), ()))
    x_2D = x.reshape(-1, contracted)
    y = jax.lax.dot_general(x_2D, w_2D, dims, preferred_element_type=jnp.float32)
    return y.reshape([sizes[letter] for letter in y_letters])


def _letters(spec: str) -> tuple[str, str, str]:
    operands, y_letters = spec.split("->")
    x_letters, w_letters = operands.split(",")
    return x_letters, w_letters, y_letters
