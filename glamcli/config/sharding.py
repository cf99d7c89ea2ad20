"""Which arrays the sharding table speaks about, by name and size, and what it may not say.

The model describes its parameters itself (`model/params.py`); a test keeps the two lists equal.
This one needs no jax, so a table that contradicts itself, or a width that does not divide, is
refused while the recipe is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from glamcli.config.nearest import Found
from glamcli.config.rules import Rules
from glamcli.config.schema import Mesh, Recipe
from glamcli.config.sizes import num_blocks

Axes = tuple[str | None, ...]

_ATTENTION: Mapping[str, Axes] = {
    "attention.query": ("layers", "embed", "heads", "head_dim"),
    "attention.key": ("layers", "embed", "heads", "head_dim"),
    "attention.value": ("layers", "embed", "heads", "head_dim"),
    "attention.out": ("layers", "heads", "head_dim", "embed"),
    "attention.bias.table": ("layers", "heads", "buckets"),
    "attention_norm.scale": ("layers", None),
    "ffn_norm.scale": ("layers", None),
}
_DENSE: Mapping[str, Axes] = {
    "ffn.gate": ("layers", "embed", "mlp"),
    "ffn.w_in": ("layers", "embed", "mlp"),
    "ffn.w_out": ("layers", "mlp", "embed"),
}
_EXPERTS: Mapping[str, Axes] = {
    "ffn.router": ("layers", None, None),
    "ffn.w_in": ("layers", "expert", "expert_embed", "expert_mlp"),
    "ffn.w_out": ("layers", "expert", "expert_embed", "expert_mlp"),
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
    return rules.model_copy(
        update={
            "seq": seq if rules.seq is None else rules.seq,
            "act_embed": act_embed if rules.act_embed is None else rules.act_embed,
            "outer_batch": rules.outer_batch
            if rules.outer_batch is not None
            else (*rules.batch, "stage"),
        }
    )


def shards(recipe: Recipe) -> tuple[int, str]:
    """Data shards as far as they are known (`data: auto` counts as one), and their mesh axes."""
    split = table(recipe.mesh).batch
    sizes = recipe.mesh.model_dump()
    shards = math.prod(1 if sizes[axis] == "auto" else sizes[axis] for axis in split)
    return shards, " x ".join(f"`mesh.{axis}`" for axis in split)


def weights(recipe: Recipe) -> dict[str, Axes]:
    """Logical axes of every parameter, by its path."""
    layers = {"dense_layer": {**_ATTENTION, **_DENSE}}
    if recipe.moe is not None:
        layers["expert_layer"] = {**_ATTENTION, **_EXPERTS}
    blocks = {
        f"blocks.{layer}.{name}": axes
        for layer, names in layers.items()
        for name, axes in names.items()
    }
    return {"embedding.table": ("vocab", "embed"), "final_norm.scale": (None,), **blocks}


def axis_sizes(recipe: Recipe) -> dict[str, tuple[int, str]]:
    """Size of every logical axis that must divide, and the recipe key that decides it."""
    model, moe, batch = recipe.model, recipe.moe, recipe.batch
    width, ffn = (model.model_dim, "model.model_dim"), (model.ffn_dim, "model.ffn_dim")
    heads = (model.num_heads, "model.num_heads")
    vocab = (model.vocab_size, "model.vocab_size")
    found = {
        "layers": (num_blocks(recipe), "model.num_layers"),
        "vocab": vocab,
        "embed": width,
        "heads": heads,
        "head_dim": (model.head_dim, "model.head_dim"),
        "mlp": ffn,
        "buckets": (model.position_buckets, "model.position_buckets"),
        "seq": (batch.row_tokens, "batch.row_tokens"),
        "act_embed": width,
        "act_heads": heads,
        "act_mlp": ffn,
        "act_vocab": vocab,
    }
    if moe is not None:
        experts = (moe.num_experts, "moe.num_experts")
        found |= {
            "expert": experts,
            "expert_embed": width,
            "expert_mlp": ffn,
            "act_expert": experts,
            "act_expert_embed": width,
            "act_expert_mlp": ffn,
        }
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
    told = []
    for array, axes in {**weights(recipe), **ACTIVATIONS}.items():
        names = [name for name in axes if name is not None]
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                both = set(getattr(rules, one)) & set(getattr(rules, other))
                if one == other or not both or {one, other} in told:
                    continue
                told.append({one, other})
                yield _twice(recipe, array, axes, one, other, sorted(both)[0])


def _twice(
    recipe: Recipe, array: str, axes: Axes, one: str, other: str, axis: str
) -> tuple[str, str, str]:
    """An array that would be split over one mesh axis in two of its dimensions."""
    rules, defaults = recipe.mesh.rules, Rules()
    changed = [name for name in (other, one) if getattr(rules, name) != getattr(defaults, name)]
    dims = ", ".join(name or "-" for name in axes)
    label = f"`{array}`" if array in weights(recipe) else array
    return (
        _key(changed[0]) if changed else "mesh.residual",
        f"{label} [{dims}] would be split over `mesh.{axis}` twice, by `mesh.rules.{one}` and "
        f"`mesh.rules.{other}`",
        f"take `{axis}` out of one of them",
    )


def indivisible(recipe: Recipe, mesh_sizes: Mapping[str, int]) -> Found:
    """(key, what, hint) of every width that does not split evenly over a mesh of these sizes; an
    axis whose size is not known yet counts as one."""
    rules, known = table(recipe.mesh), axis_sizes(recipe)
    arrays = {**weights(recipe), **ACTIVATIONS}
    told = set()
    for array, axes in arrays.items():
        for name in axes:
            if name not in known:
                continue
            size, key = known[name]
            split = [axis for axis in getattr(rules, name) if mesh_sizes.get(axis, 1) > 1]
            parts = math.prod(mesh_sizes[axis] for axis in split)
            if size % parts == 0 or (key, tuple(split)) in told:
                continue
            told.add((key, tuple(split)))
            over = " x ".join(f"`mesh.{axis}`" for axis in split)
            pairs = " (in pairs)" if name == "layers" and recipe.moe else ""
            label = f"`{name}` of " + (f"`{array}`" if array in weights(recipe) else array)
            near = max(n for n in range(1, parts) if size % n == 0)
            yield (
                key,
                f"`{key}` is {size}{pairs}, which does not divide over {over} {parts} ({label})",
                f"{over} may be {near}",
            )


def _key(name: str) -> str:
    return f"mesh.rules.{name}"
