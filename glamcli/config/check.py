"""Rules between fields of a recipe, told all at once and before jax is imported.

What one field may be is in `schema.py`. Every rule here compares fields, places the problem at
the field a person would edit, and names the nearest values that work.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

from glamcli.config import sharding, stages
from glamcli.config.explain import Problem
from glamcli.config.files import is_path, suite_names
from glamcli.config.mixtures import Mixture
from glamcli.config.nearest import Found, divisors, multiples, use
from glamcli.config.schema import NUM_BYTE_IDS, Mesh, Optimizer, Recipe
from glamcli.config.yaml import shown

# SentencePiece with byte fallback: 4 special pieces, 256 bytes, and some characters.
MIN_PIECES = 300

_ADAFACTOR_ONLY = (
    "clip_update_rms",
    "decay_exponent",
    "scale_by_parameter",
    "factored_min_dim",
    "factor_heads",
)
_ADAMW_ONLY = ("beta2", "weight_decay")


class Checkable(Protocol):
    """A recipe that knows where its values were written (`load.Loaded`)."""

    @property
    def recipe(self) -> Recipe: ...

    def place(self, key: str) -> str: ...


def check(loaded: Checkable, mixture: Mixture | None = None) -> list[Problem]:
    """Every contradiction of the recipe, and between it and its mixture."""
    recipe = loaded.recipe
    found = [
        *_model(recipe),
        *_experts(recipe),
        *_batch(recipe),
        *_mesh(recipe),
        *stages.wrong(recipe),
        *_tokenizer(recipe),
        *_cache(recipe),
        *_optimizer(recipe),
        *_finish(recipe),
        *(_heldout(recipe, mixture) if mixture else ()),
    ]
    return [Problem(loaded.place(key), what, hint) for key, what, hint in found]


def _model(recipe: Recipe) -> Found:
    model = recipe.model
    if recipe.moe and model.num_layers % 2:
        yield (
            "model.num_layers",
            "layers come in pairs (an expert layer, a dense layer), but `model.num_layers` is "
            f"{model.num_layers}",
            use(max(2, model.num_layers - 1), model.num_layers + 1),
        )
    buckets = model.position_buckets
    if buckets < 4 or buckets % 2:
        yield (
            "model.position_buckets",
            "half of the buckets hold one distance each and half share the rest, so "
            f"`model.position_buckets` must be even and at least 4, not {buckets}",
            use(max(4, buckets - buckets % 2), max(6, buckets + buckets % 2)),
        )
    elif model.position_max_distance <= buckets // 2:
        yield (
            "model.position_max_distance",
            f"the first {buckets // 2} of `model.position_buckets` hold one distance each, so "
            f"`model.position_max_distance` must be above that, not {model.position_max_distance}",
            f"use {4 * buckets}",
        )


def _experts(recipe: Recipe) -> Found:
    moe = recipe.moe
    if moe is None:
        return
    if moe.experts_per_token > moe.num_experts:
        yield (
            "moe.num_experts",
            f"`moe.experts_per_token` is {moe.experts_per_token}, but there is only "
            f"{moe.num_experts} expert",
            "use `moe: null` for a model without experts",
        )
    if moe.experts_per_token == 1 and moe.second_policy != "all":
        yield (
            "moe.second_policy",
            "with `moe.experts_per_token` 1 there is no second choice, but `moe.second_policy` is "
            f"`{moe.second_policy}`",
            "use `all`, or 2 experts per token",
        )
    if moe.eval_capacity_factor is not None and moe.eval_dispatch == "dropless":
        yield (
            "moe.eval_capacity_factor",
            "`moe.eval_dispatch` is `dropless`, which has no capacity, but "
            f"`moe.eval_capacity_factor` is {moe.eval_capacity_factor:g}",
            "remove it, or set `moe.eval_dispatch` to `gather`",
        )
    for key in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, key)
        if factor is None or moe.group_tokens * factor >= moe.num_experts:
            continue
        need = moe.num_experts / factor
        yield (
            f"moe.{key}",
            f"less than one slot per expert and group: {moe.group_tokens} tokens x "
            f"{factor:g} for {moe.num_experts} experts",
            f"use `moe.group_tokens` {1 << math.ceil(math.log2(need))} or more"
            if need < 1e9
            else f"use {math.ceil(moe.num_experts / moe.group_tokens)} or more",
        )


def _batch(recipe: Recipe) -> Found:
    batch, moe = recipe.batch, recipe.moe
    microbatches = recipe.pipeline.microbatches or 1
    parts = batch.accumulate * microbatches
    yield from sharding.indivisible_rows(recipe, sharding.known_sizes(recipe.mesh))
    if moe is None:
        return
    group, row = moe.group_tokens, batch.row_tokens
    if group % row and row % group:
        yield (
            "moe.group_tokens",
            f"a group holds whole rows or a row holds whole groups, but `moe.group_tokens` is "
            f"{group} and `batch.row_tokens` {row}",
            multiples(group, row),
        )
    elif batch.rows % parts == 0 and (batch.rows // parts * row) % group:
        rows = batch.rows // parts
        part = f"each of {batch.accumulate} parts" if batch.accumulate > 1 else "a batch"
        if microbatches > 1:
            part = "a microbatch"
        options = [size * row for size in divisors(rows) if size * row < group]
        yield (
            "moe.group_tokens",
            f"{part} has {rows} rows x {row} tokens, which does not divide into groups of {group}",
            f"use {options[-1]}" if options else None,
        )


def _mesh(recipe: Recipe) -> Found:
    if recipe.mesh.auto:
        defaults = Mesh()
        for axis in ("data", "expert", "model"):
            if (size := getattr(recipe.mesh, axis)) != getattr(defaults, axis):
                what = f"`mesh: auto` chooses `mesh.{axis}`, but it is {size}"
                yield f"mesh.{axis}", what, "remove it, or set `mesh.auto` to false"
    wrong = list(sharding.contradictions(recipe))
    yield from wrong
    if not wrong:
        yield from sharding.indivisible_widths(recipe, sharding.known_sizes(recipe.mesh))


def _tokenizer(recipe: Recipe) -> Found:
    tokenizer, vocab = recipe.data.tokenizer, recipe.model.vocab_size
    if tokenizer.kind == "bytes":
        if vocab < NUM_BYTE_IDS:
            yield (
                "model.vocab_size",
                f"bytes need {NUM_BYTE_IDS} ids, but `model.vocab_size` is {vocab}",
                use(NUM_BYTE_IDS, 320),
            )
        for name in ("path", "train_vocab_size"):
            if getattr(tokenizer, name) is not None:
                key = f"data.tokenizer.{name}"
                yield key, f"`{key}` means nothing to the `bytes` tokenizer", "remove it"
        return
    pieces = tokenizer.train_vocab_size
    if pieces is not None and tokenizer.path is not None:
        yield (
            "data.tokenizer.train_vocab_size",
            "`data.tokenizer.path` names a trained model, and `train_vocab_size` is for training "
            "one",
            "remove one of them",
        )
    if tokenizer.path is not None:
        return
    key = "model.vocab_size" if pieces is None else "data.tokenizer.train_vocab_size"
    if (pieces or vocab) < MIN_PIECES:
        yield (
            key,
            f"SentencePiece with byte fallback needs {MIN_PIECES} pieces, but `{key}` is "
            f"{pieces or vocab}",
            use(MIN_PIECES, 512),
        )
    if pieces is not None and pieces > vocab:
        yield (
            key,
            f"`{key}` is {pieces}, more than `model.vocab_size` {vocab}",
            f"use at most {vocab}",
        )


def _cache(recipe: Recipe) -> Found:
    folder = recipe.data.cache_dir
    if folder is not None and "://" in folder:
        what = f"the cache folder must be local, but `data.cache_dir` is `{shown(folder)}`"
        yield "data.cache_dir", what, "remove it for the user's cache folder"


def _optimizer(recipe: Recipe) -> Found:
    optimizer, steps = recipe.optimizer, recipe.train.steps
    if optimizer.warmup_steps > steps:
        yield (
            "optimizer.warmup_steps",
            f"`optimizer.warmup_steps` is {optimizer.warmup_steps}, more than the {steps} steps of "
            "the run",
            use(0, max(1, steps // 10)),
        )
    elif optimizer.warmup_steps > optimizer.hold_steps:
        yield (
            "optimizer.warmup_steps",
            f"`optimizer.warmup_steps` is {optimizer.warmup_steps}, so the rate would fall (after "
            f"`optimizer.hold_steps` {optimizer.hold_steps}) before it has risen",
            f"use `optimizer.hold_steps` {optimizer.warmup_steps} or more",
        )
    others = _ADAMW_ONLY if optimizer.name == "adafactor" else _ADAFACTOR_ONLY
    defaults = Optimizer()
    for name in others:
        value, default = getattr(optimizer, name), getattr(defaults, name)
        if value != default:
            yield (
                f"optimizer.{name}",
                f"`optimizer.{name}` means nothing to `{optimizer.name}`",
                f"remove it, or set it to its default {_yaml(default)}",
            )


def _finish(recipe: Recipe) -> Found:
    finish = recipe.finish
    if len(set(finish.shots)) != len(finish.shots):
        yield "finish.shots", f"`finish.shots` repeats a number: {list(finish.shots)}", None
    if finish.suite is None:
        return
    if not finish.shots:
        yield "finish.shots", "`finish.suite` is asked for with no `finish.shots`", "use [0]"
    # Found out now rather than after the last step.
    if is_path(finish.suite):
        if not Path(finish.suite).is_file():
            yield "finish.suite", f"no such suite file: `{shown(finish.suite)}`", None
    elif finish.suite not in suite_names():
        hint = "shipped: " + ", ".join(f"`{name}`" for name in suite_names())
        yield "finish.suite", f"no shipped suite is called `{shown(finish.suite)}`", hint


def _heldout(recipe: Recipe, mixture: Mixture) -> Found:
    if mixture.heldout_frac:
        return
    if recipe.every.heldout_steps is not None:
        yield (
            "every.heldout_steps",
            "the mixture keeps no document out of training (`heldout_frac` 0), but "
            f"`every.heldout_steps` is {recipe.every.heldout_steps}",
            "set it to null, or raise `heldout_frac` in the mixture",
        )
    if recipe.finish.suite == "quick":
        yield (
            "finish.suite",
            "the quick suite is made of held-out documents, but the mixture keeps none "
            "(`heldout_frac` 0)",
            "raise `heldout_frac` in the mixture",
        )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
