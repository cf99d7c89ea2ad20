"""Logical axes of every array, the sharding table over them, and what contradicts either.

The model takes the axes of its parameters from here. This file needs no jax, so a table that
contradicts itself, and rows or a width that do not divide, are refused while the recipe is read.
"""

import math
from collections.abc import Mapping
from itertools import chain, combinations
from typing import get_args

from glamcli.config.devices import MeshAxis, Rules
from glamcli.config.nearest import Found, multiples
from glamcli.config.schema import Mesh, Recipe
from glamcli.config.sizes import num_blocks
from glamcli.errors import RecipeError

Axes = tuple[str | None, ...]
"""A name for every dimension of an array; None is never split."""

MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)

NORM: Axes = (None,)
ATTENTION: Mapping[str, Axes] = {
    "attention.query": ("embed", "heads", "head_dim"),
    "attention.key": ("embed", "heads", "head_dim"),
    "attention.value": ("embed", "heads", "head_dim"),
    "attention.out": ("heads", "head_dim", "embed"),
    "attention.bias.table": ("heads", "buckets"),
    "attention_norm.scale": NORM,
    "ffn_norm.scale": NORM,
}
DENSE: Mapping[str, Axes] = {
    "ffn.gate": ("embed", "mlp"),
    "ffn.w_in": ("embed", "mlp"),
    "ffn.w_out": ("mlp", "embed"),
}
EXPERTS: Mapping[str, Axes] = {
    "ffn.router": (None, None),
    "ffn.w_in": ("expert", "expert_embed", "expert_mlp"),
    "ffn.w_out": ("expert", "expert_embed", "expert_mlp"),
}
"""Parameters of one layer; the decoder stacks them along `layers`."""
OUTSIDE: Mapping[str, Axes] = {
    "embedding.table": ("vocab", "embed"),
    "final_norm.scale": NORM,
}

ACTIVATIONS: Mapping[str, Axes] = {
    "the residual stream": ("batch", "seq", "act_embed"),
    "queries, keys and values": ("batch", None, "act_heads", None),
    "keys and values that are kept": ("layers", "batch", None, "act_heads", None),
    "position biases": ("batch", "act_heads", None),
    "the feed-forward layer's inside": ("batch", None, "act_mlp"),
    "rows at the embedding": ("outer_batch", "seq", "act_embed"),
    "rows at the softmax": ("outer_batch", None, "act_embed"),
    "logits": ("outer_batch", None, "act_vocab"),
    "microbatches": ("layers", "batch", "seq", "act_embed"),
    "rows on their way to routing": ("batch", None, "act_expert_embed"),
    "tokens in groups": ("group", None, "act_expert_embed"),
    "slots of a device's groups": (None, "group", None, "act_expert_embed"),
    "tokens by expert": ("act_expert", "expert_group", None, "act_expert_embed"),
    "the experts' inside": ("act_expert", "expert_group", None, "act_expert_mlp"),
}
"""What the model lays out besides parameters, in the words of messages."""

DECIDED_BY = {
    "model.num_layers": ("layers",),
    "model.vocab_size": ("vocab", "act_vocab"),
    "model.model_dim": ("embed", "act_embed", "expert_embed", "act_expert_embed"),
    "model.num_heads": ("heads", "act_heads"),
    "model.head_dim": ("head_dim",),
    "model.ffn_dim": ("mlp", "act_mlp", "expert_mlp", "act_expert_mlp"),
    "model.position_buckets": ("buckets",),
    "batch.row_tokens": ("seq",),
    "moe.num_experts": ("expert", "act_expert"),
}
"""Keys of a recipe, and the logical axes whose size they decide."""

CARRIES = {
    "slice": (
        ("batch", "outer_batch", "group", "expert_group"),
        "is the slow network and carries rows only",
    ),
    "stage": (("layers", "outer_batch"), "holds layers, and nothing else"),
}
"""Mesh axes that only these dimensions may use, and why."""


def table(mesh: Mesh) -> Rules:
    """The recipe's rules, with those that follow from others worked out."""
    split = {"embed": ((), ("model",)), "sequence": (("model",), ()), "whole": ((), ())}
    seq, act_embed = split[mesh.residual]
    rules = mesh.rules
    follow = {"seq": seq, "act_embed": act_embed, "outer_batch": (*rules.batch, "stage")}
    missing = {name: axes for name, axes in follow.items() if getattr(rules, name) is None}
    return rules.model_copy(update=missing)


def known_sizes(mesh: Mesh) -> dict[str, int]:
    """Sizes of the mesh axes that the recipe gives; `data: auto` is left out."""
    return {axis: size for axis in MESH_AXES if isinstance(size := getattr(mesh, axis), int)}


def num_shards(recipe: Recipe, mesh_sizes: Mapping[str, int]) -> int:
    """Data shards of a batch; a mesh axis whose size is not known counts as one."""
    return math.prod(mesh_sizes.get(axis, 1) for axis in table(recipe.mesh).batch)


def device_heads(recipe: Recipe) -> int:
    """Attention heads of a device, as far as the recipe gives the mesh."""
    sizes = known_sizes(recipe.mesh)
    split = math.prod(sizes.get(axis, 1) for axis in table(recipe.mesh).act_heads)
    return recipe.model.num_heads // split


def weights(recipe: Recipe) -> dict[str, Axes]:
    """Logical axes of every parameter, by its path."""
    layers = {"dense_layer": {**ATTENTION, **DENSE}}
    if recipe.moe is not None:
        layers["expert_layer"] = {**ATTENTION, **EXPERTS}
    blocks = {
        f"blocks.{layer}.{name}": ("layers", *axes)
        for layer, names in layers.items()
        for name, axes in names.items()
    }
    return {**OUTSIDE, **blocks}


def axis_sizes(recipe: Recipe) -> dict[str, tuple[int, str]]:
    """Size of every logical axis that must divide, and the recipe key that decides it."""
    found = {}
    for key, names in DECIDED_BY.items():
        section, field = key.split(".")
        if (settings := getattr(recipe, section)) is None:
            continue
        size = num_blocks(recipe) if key == "model.num_layers" else getattr(settings, field)
        for name in names:
            if recipe.moe is not None or "expert" not in name:
                found[name] = (size, key)
    return found


def contradictions(recipe: Recipe) -> Found:
    """(key, what, hint) of every rule that no mesh can follow."""
    rules = table(recipe.mesh)
    for name in type(rules).model_fields:
        split = getattr(rules, name)
        for axis in sorted({axis for axis in split if split.count(axis) > 1}):
            yield _key(name), f"`mesh.rules.{name}` names `{axis}` twice", "once is enough"
        for axis, (allowed, why) in CARRIES.items():
            if axis in split and name not in allowed:
                yield (
                    _key(name),
                    f"`mesh.rules.{name}` uses `{axis}`, which {why}",
                    f"take `{axis}` out",
                )
        if name == "layers" and set(split) - {"stage"}:
            yield (
                _key(name),
                "layers run one after another, so `mesh.rules.layers` may only use `stage`",
                "use [stage] or []",
            )
    reported = []
    given = recipe.mesh.rules.model_dump(exclude_defaults=True)
    for array, axes in _arrays(recipe).items():
        for one, other in combinations([name for name in axes if name is not None], 2):
            both = set(getattr(rules, one)) & set(getattr(rules, other))
            if one == other or not both or {one, other} in reported:
                continue
            reported.append({one, other})
            changed = (_key(name) for name in (other, one) if name in given)
            dims, axis = ", ".join(name or "-" for name in axes), min(both)
            yield (
                next(changed, "mesh.residual"),
                f"{array} [{dims}] would be split over `mesh.{axis}` twice, by "
                f"`mesh.rules.{one}` and `mesh.rules.{other}`",
                f"take `{axis}` out of one of them",
            )


def check_divides(problems: Found) -> None:
    """Raises the first of them as a RecipeError, placed at its key."""
    for key, what, hint in problems:
        raise RecipeError(what, hint=hint, key=key)


def indivisible(recipe: Recipe, mesh_sizes: Mapping[str, int]) -> Found:
    """Everything that does not split evenly over a mesh of these sizes."""
    return chain(indivisible_rows(recipe, mesh_sizes), indivisible_widths(recipe, mesh_sizes))


def indivisible_rows(recipe: Recipe, mesh_sizes: Mapping[str, int]) -> Found:
    """Rows that do not split evenly over data shards, accumulated parts and microbatches."""
    batch, split = recipe.batch, table(recipe.mesh).batch
    microbatches = recipe.pipeline.microbatches or 1
    shards = num_shards(recipe, mesh_sizes)
    parts = shards * batch.accumulate * microbatches
    if batch.rows % parts == 0:
        return
    axes = " x ".join(f"`mesh.{axis}`" for axis in split)
    counts = (
        (shards, f"data shards ({axes})"),
        (batch.accumulate, "accumulated parts"),
        (microbatches, "microbatches"),
    )
    over = " x ".join(f"{number} {what}" for number, what in counts if number > 1)
    yield (
        "batch.rows",
        f"`batch.rows` is {batch.rows}, which does not divide over {over}",
        multiples(batch.rows, parts),
    )


def indivisible_widths(recipe: Recipe, mesh_sizes: Mapping[str, int]) -> Found:
    """Dimensions of weights and activations that do not split evenly over mesh axes; an axis whose
    size is not known yet counts as one."""
    rules, known = table(recipe.mesh), axis_sizes(recipe)
    reported = set()
    for array, axes in _arrays(recipe).items():
        for name in axes:
            if name not in known:
                continue
            size, key = known[name]
            split = [axis for axis in getattr(rules, name) if mesh_sizes.get(axis, 1) > 1]
            parts = math.prod(mesh_sizes[axis] for axis in split)
            if size % parts == 0 or (key, tuple(split)) in reported:
                continue
            reported.add((key, tuple(split)))
            over = " x ".join(f"`mesh.{axis}`" for axis in split)
            pairs = " (in pairs)" if name == "layers" and recipe.moe else ""
            near = max(n for n in range(1, parts) if size % n == 0)
            yield (
                key,
                f"`{key}` is {size}{pairs}, which does not divide over {over} {parts} "
                f"(`{name}` of {array})",
                f"{over} may be {near}",
            )


def _arrays(recipe: Recipe) -> dict[str, Axes]:
    """Logical axes of everything that is laid out, in the words of messages."""
    return {f"`{path}`": axes for path, axes in weights(recipe).items()} | dict(ACTIVATIONS)


def _key(name: str) -> str:
    return f"mesh.rules.{name}"
