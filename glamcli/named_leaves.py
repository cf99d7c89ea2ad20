"""Trees of arrays as flat dicts of named leaves, `params/blocks/dense_layer/...`: the names of
checkpoints.

Names come from dict keys, fields and indices, so no Python class is part of a file's format.
"""

from collections.abc import Mapping
from typing import Any

import jax

from glamcli.errors import first_of

SHOWN_DIFFERENCES = 6


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree of any classes as a flat dict of its leaves, named `params/layers/...`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves as nested dicts, one level per part of a name."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    return tree


def described_leaves(named: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[dtype, shape] of every leaf, for JSON."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named.items()}


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any], names: list[str]) -> str:
    """What differs in these leaves, in words; the first few of them."""

    def text(entry: list[Any] | None) -> str:
        return "absent" if entry is None else f"{entry[0]}{entry[1]}"

    each = [f"`{name}` is {text(saved.get(name))}, not {text(wanted.get(name))}" for name in names]
    return "; ".join(first_of(each, SHOWN_DIFFERENCES))
