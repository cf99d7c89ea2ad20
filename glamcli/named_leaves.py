"""Trees of arrays as flat dicts of named leaves, `params/blocks/dense_layer/...`: the names of
checkpoints.

Names come from dict keys, fields and indices, so no Python class is part of a file's format.
Called by `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

SHOWN_DIFFERENCES = 6


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree of any classes as a flat dict of its leaves, named `params/layers/...`."""

    def part(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise ValueError(f"unnamed tree node {key!r}")

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part(key) for key in path): leaf for path, leaf in leaves}


def with_leaves(target: Any, named: Mapping[str, Any]) -> Any:
    """A tree of the structure of `target` with these leaves: the inverse of `named_leaves`."""
    leaves = [named[name] for name in named_leaves(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


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


def unlike(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names, in order, that only one has or that differ in dtype or shape."""
    return [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any], names: list[str]) -> str:
    """What differs in these leaves, in words; the first few of them."""

    def text(entry: list[Any] | None) -> str:
        return "absent" if entry is None else f"{entry[0]}{entry[1]}"

    shown = [
        f"`{name}` is {text(saved.get(name))}, not {text(wanted.get(name))}"
        for name in names[:SHOWN_DIFFERENCES]
    ]
    more = len(names) - len(shown)
    return "; ".join(shown + [f"and {more} more"] * bool(more))
