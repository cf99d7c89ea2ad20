"""How parameters are described and how modules become plain functions of plain dicts.

Modules (`nnx.Module`) are builders: they say which parameters exist, with which axes and initial
values, and how they are applied. Everything that runs is plain JAX on nested dicts of arrays: a
`Blueprint` turns a module into the shapes, the axes, the initialiser and the bound module that
belong to one nested dict. Nothing else touches flax, apart from modules subclassing `nnx.Module`.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from glamcli.config.sharding import Axes

Init = Callable[[Array, tuple[int, ...]], Array]
_Module = TypeVar("_Module", bound=nnx.Module)


def uniform_fan_in(key: Array, shape: tuple[int, ...], contracted: int = -2) -> Array:
    """Uniform in +-sqrt(3 / fan_in), variance 1 / fan_in (feed-forward, expert and gate weights);
    fan_in is the size of the dimension that the product with the input sums over."""
    bound = math.sqrt(3.0 / shape[contracted])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: Init = uniform_fan_in
) -> nnx.Param:
    """A float32 parameter with the names of its logical axes.

    The axes feed sharding, optimizer factoring, counting and checkpoint metadata, so they are
    given once, here, next to the shape.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    return nnx.Param(init(rngs.params(), shape), axes=axes, init=init)


@dataclass(frozen=True, eq=False)
class Blueprint(Generic[_Module]):
    """What a module is made of, with nothing allocated: `shapes` and `axes` have the form of the
    parameters that `init` makes and `bind` takes."""

    shapes: Any
    axes: Any
    init: Callable[[Array], Any]
    bind: Callable[[dict[str, Any]], _Module]


def blueprint(make: Callable[[nnx.Rngs], _Module]) -> Blueprint[_Module]:
    """The blueprint of the module that `make` builds from random streams."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)

    def metadata(name: str) -> dict[str, Any]:
        return nnx.to_pure_dict(
            jax.tree.map(
                lambda variable: variable.get_metadata(name),
                state,
                is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
            )
        )

    inits = metadata("init")

    def init(key: Array) -> dict[str, Any]:
        # All keys from one split: a random operation per parameter is slow to compile.
        keys = jax.random.split(key, len(jax.tree.leaves(shapes)))
        keys = jax.tree.unflatten(jax.tree.structure(shapes), list(keys))
        return jax.tree.map(lambda start, key, s: start(key, s.shape), inits, keys, shapes)

    return Blueprint(shapes, metadata("axes"), init, partial(nnx.merge, graph))


def stacked(layer: Blueprint[_Module], num: int) -> Blueprint[_Module]:
    """The blueprint of `num` copies of `layer`, stacked along a new first axis.

    Each copy is initialised from its own key. `bind` still takes the parameters of one copy:
    the slice that a scan over the first axis hands out.
    """
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((num, *s.shape), s.dtype), layer.shapes)
    axes = jax.tree.map(
        lambda names: ("layers", *names), layer.axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )

    def init(key: Array) -> dict[str, Any]:
        return jax.vmap(layer.init)(jax.random.split(key, num))

    return Blueprint(shapes, axes, init, layer.bind)


def unstacked(layer: Blueprint[_Module], num: int) -> Blueprint[_Module]:
    """The blueprint of `num` copies of `layer`, each with arrays of its own, in a list. Initial
    values are those of `stacked`, bit for bit."""
    init = stacked(layer, num).init
    shapes, axes = [layer.shapes] * num, [layer.axes] * num
    return Blueprint(shapes, axes, lambda key: unstack(init(key), num), layer.bind)


def stack(trees: list[Any]) -> Any:
    """Trees of arrays as one tree of arrays with a new first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def unstack(tree: Any, num: int) -> list[Any]:
    """The inverse of `stack` for `num` trees."""
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(num)]


def stack_blocks(tree: Any) -> Any:
    """Parameters, or a tree that holds such (a training state), with blocks that are apart
    (`Decoder.apart`) stacked: the form of checkpoints, for any depth and number of devices."""
    return _with_blocks(tree, stack)


def unstack_blocks(tree: Any, num_blocks: int) -> Any:
    """The inverse of `stack_blocks`; a copy of every block."""
    return _with_blocks(tree, lambda blocks: unstack(blocks, num_blocks))


def _with_blocks(tree: Any, change: Callable[[Any], Any]) -> Any:
    def has_blocks(node: Any) -> bool:
        return isinstance(node, dict) and "blocks" in node

    def changed(node: Any) -> Any:
        return {**node, "blocks": change(node["blocks"])} if has_blocks(node) else node

    return jax.tree.map(changed, tree, is_leaf=has_blocks)
