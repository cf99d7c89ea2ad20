"""Rules between fields of a recipe, all reported at once and before jax is imported.

What one field may be is in `schema.py`. Every rule here compares fields, places the problem at the
field to edit, and names the nearest values that work.
"""

import math
import os
from collections.abc import Callable
from itertools import pairwise

from glamcli.config import sharding, stages
from glamcli.config.explain import Problem
from glamcli.config.files import is_path, shipped
from glamcli.config.mixtures import Mixture
from glamcli.config.nearest import Found, divisors, multiples, use
from glamcli.config.schema import NUM_BYTE_IDS, Mesh, Moe, Optimizer, Recipe
from glamcli.config.sizes import (
    FLASH_BLOCKS,
    MAX_FLASH_TOKENS,
    capacity_factors,
    flash_block,
    slots_per_expert,
)
from glamcli.config.yaml import shown
from glamcli.storage import is_url

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


def check(
    recipe: Recipe, place: Callable[[str], str], mixture: Mixture | None = None
) -> list[Problem]:
    """Every contradiction of the recipe and its mixture; `place` gives `file:line` of a key."""
    found = [
        *_model(recipe),
        *_experts(recipe),
        *_batch(recipe),
        *_mesh(recipe),
        *stages.wrong(recipe),
        *_tokenizer(recipe),
        *_optimizer(recipe),
        *_finish(recipe),
        *(_heldout(recipe, mixture) if mixture else ()),
    ]
    return [Problem(place(key), what, hint) for key, what, hint in found]


def _model(recipe: Recipe) -> Found:
    model = recipe.model
    num, buckets, distance = model.num_layers, model.position_buckets, model.position_max_distance
    if recipe.moe and num % 2:
        what = f"layers come in pairs (expert, dense), but `model.num_layers` is {num}"
        yield "model.num_layers", what, use(max(2, num - 1), num + 1)
    if buckets < 4 or buckets % 2:
        what = (
            "half of the buckets hold one distance each and half share the rest, so "
            f"`model.position_buckets` must be even and at least 4, not {buckets}"
        )
        below = buckets - buckets % 2
        yield "model.position_buckets", what, use(max(4, below), max(6, below + 2 * (buckets % 2)))
    elif distance <= buckets // 2:
        what = (
            f"the first {buckets // 2} of `model.position_buckets` hold one distance each, so "
            f"`model.position_max_distance` must be above that, not {distance}"
        )
        yield "model.position_max_distance", what, f"use {4 * buckets}"
    heads, tokens = sharding.device_heads(recipe), recipe.batch.row_tokens
    if model.attention == "pallas" and flash_block(model, tokens, heads) is None:
        what = (
            f"the kernel takes rows of a multiple of {min(FLASH_BLOCKS)} tokens up to "
            f"{MAX_FLASH_TOKENS}, heads of 128 or, in pairs on a device, 64, and "
            "`model.position_max_distance` up to a block of 128, 256 or 512 that divides a row"
        )
        yield "model.attention", what, "use `auto` or `xla`"


def _experts(recipe: Recipe) -> Found:
    moe = recipe.moe
    if moe is None:
        return
    chosen, num, policy = moe.experts_per_token, moe.num_experts, moe.second_policy
    if chosen > num:
        what = f"`moe.experts_per_token` is {chosen}, but there is only {num} expert"
        yield "moe.num_experts", what, "use `moe: null` for a model without experts"
    if chosen == 1 and policy != "all":
        what = f"with one expert per token there is no second choice for a policy `{policy}`"
        yield "moe.second_policy", what, "use `all`, or `moe.experts_per_token` 2"
    factor = moe.eval_capacity_factor
    if factor is not None and moe.eval_dispatch == "dropless":
        what = (
            "`moe.eval_dispatch` is `dropless`, which has no capacity, but "
            f"`moe.eval_capacity_factor` is {factor:g}"
        )
        yield "moe.eval_capacity_factor", what, "remove it, or set `moe.eval_dispatch` to `gather`"
    yield from _adaptive_capacity(moe)
    factors = {key: getattr(moe, key) for key in ("capacity_factor", "eval_capacity_factor")}
    if moe.adaptive_capacity is not None:
        factors["adaptive_capacity.lower_factors"] = capacity_factors(moe)[0]
    for key, factor in factors.items():
        if factor is None or moe.group_tokens * factor >= num:
            continue
        what = (
            f"less than one slot per expert and group: {moe.group_tokens} tokens x {factor:g} "
            f"for {num} experts"
        )
        hint = f"use {math.ceil(num / moe.group_tokens)} or more"
        if num / factor < 1e9:
            hint = f"use `moe.group_tokens` {1 << math.ceil(math.log2(num / factor))} or more"
        yield f"moe.{key}", what, hint


def _adaptive_capacity(moe: Moe) -> Found:
    key = "moe.adaptive_capacity"
    if moe.adaptive_capacity is None:
        return
    if moe.dispatch == "dropless":
        what = f"`moe.dispatch` is `dropless`, which has no capacity, but there is `{key}`"
        yield key, what, "remove it, or use another `moe.dispatch`"
    lower, most = moe.adaptive_capacity.lower_factors, moe.capacity_factor
    if not lower or max(lower) >= most:
        key += ".lower_factors"
        what = f"`{key}` must be below `moe.capacity_factor` {most:g}, and there must be some"
        yield key, what, f"for example [{most / 2:g}]"
        return
    factors = capacity_factors(moe)
    slots = [slots_per_expert(moe.group_tokens, moe.num_experts, factor) for factor in factors]
    for (one, other), (few, more) in zip(pairwise(factors), pairwise(slots), strict=True):
        if few == more:
            what = f"capacity factors {one:g} and {other:g} both give an expert {few} slots"
            yield f"{key}.lower_factors", f"{what} of {moe.group_tokens} tokens", "remove one"


def _batch(recipe: Recipe) -> Found:
    batch, moe = recipe.batch, recipe.moe
    microbatches = recipe.pipeline.microbatches or 1
    parts = batch.accumulate * microbatches
    yield from sharding.indivisible_rows(recipe, sharding.known_sizes(recipe.mesh))
    if moe is None:
        return
    group, row = moe.group_tokens, batch.row_tokens
    if group % row and row % group:
        what = (
            "a group holds whole rows or a row holds whole groups, but `moe.group_tokens` is "
            f"{group} and `batch.row_tokens` {row}"
        )
        yield "moe.group_tokens", what, multiples(group, row)
    elif batch.rows % parts == 0 and (batch.rows // parts * row) % group:
        rows = batch.rows // parts
        part = f"each of {batch.accumulate} parts" if batch.accumulate > 1 else "a batch"
        part = "a microbatch" if microbatches > 1 else part
        what = (
            f"{part} has {rows} rows x {row} tokens, which does not divide into groups of {group}"
        )
        options = [size * row for size in divisors(rows) if size * row < group]
        yield "moe.group_tokens", what, f"use {options[-1]}" if options else None


def _mesh(recipe: Recipe) -> Found:
    if recipe.mesh.auto:
        defaults = Mesh()
        for axis in ("data", "expert", "model"):
            if (size := getattr(recipe.mesh, axis)) != getattr(defaults, axis):
                what = f"`mesh: auto` chooses `mesh.{axis}`, but it is {size}"
                yield f"mesh.{axis}", what, "remove it, or set `mesh.auto` to false"
    if recipe.mesh.expert_sums == "bfloat16":
        key, what = "mesh.expert_sums", "`mesh.expert_sums` is `bfloat16`, but "
        if recipe.model.activation_dtype == "float32":
            yield key, what + "`model.activation_dtype` is `float32`", "remove it"
        elif recipe.moe and recipe.moe.dispatch == "dropless":
            what += "`moe.dispatch` is `dropless`, which adds up in float32"
            yield key, what, "remove it, or use another `moe.dispatch`"
    wrong = list(sharding.contradictions(recipe))
    yield from wrong
    if not wrong:
        yield from sharding.indivisible_widths(recipe, sharding.known_sizes(recipe.mesh))


def _tokenizer(recipe: Recipe) -> Found:
    tokenizer, vocab = recipe.data.tokenizer, recipe.model.vocab_size
    if tokenizer.kind == "bytes":
        if vocab < NUM_BYTE_IDS:
            what = f"bytes need {NUM_BYTE_IDS} ids, but `model.vocab_size` is {vocab}"
            yield "model.vocab_size", what, use(NUM_BYTE_IDS, 320)
        for name in ("path", "train_vocab_size"):
            if getattr(tokenizer, name) is not None:
                key = f"data.tokenizer.{name}"
                yield key, f"`{key}` has no effect with the `bytes` tokenizer", "remove it"
        return
    pieces = tokenizer.train_vocab_size
    if tokenizer.path is not None:
        if pieces is not None:
            what = (
                "`data.tokenizer.path` names a trained model, but `train_vocab_size` is set as well"
            )
            yield "data.tokenizer.train_vocab_size", what, "remove one of them"
        return
    key = "model.vocab_size" if pieces is None else "data.tokenizer.train_vocab_size"
    size = pieces or vocab
    if size < MIN_PIECES:
        what = f"SentencePiece with byte fallback needs {MIN_PIECES} pieces, but `{key}` is {size}"
        yield key, what, use(MIN_PIECES, 512)
    if size > vocab:
        yield (
            key,
            f"`{key}` is {size}, more than `model.vocab_size` {vocab}",
            f"use at most {vocab}",
        )


def _optimizer(recipe: Recipe) -> Found:
    optimizer, steps = recipe.optimizer, recipe.train.steps
    key, warmup, hold = "optimizer.warmup_steps", optimizer.warmup_steps, optimizer.hold_steps
    if warmup > steps:
        what = f"`{key}` is {warmup}, more than the {steps} steps of the run"
        yield key, what, use(0, max(1, steps // 10))
    elif warmup > hold:
        what = (
            f"`{key}` is {warmup}, so the rate would fall (after `optimizer.hold_steps` {hold}) "
            "before it has risen"
        )
        yield key, what, f"use `optimizer.hold_steps` {warmup} or more"
    defaults = Optimizer()
    for name in _ADAMW_ONLY if optimizer.name == "adafactor" else _ADAFACTOR_ONLY:
        key, default = f"optimizer.{name}", getattr(defaults, name)
        if getattr(optimizer, name) != default:
            text = str(default).lower() if isinstance(default, bool) else default
            what = f"`{key}` has no effect with `{optimizer.name}`"
            yield key, what, f"remove it, or set it to its default {text}"


def _finish(recipe: Recipe) -> Found:
    finish = recipe.finish
    if len(set(finish.shots)) != len(finish.shots):
        yield "finish.shots", f"`finish.shots` repeats a number: {list(finish.shots)}", None
    if finish.suite is None:
        return
    if not finish.shots:
        yield "finish.shots", "`finish.suite` is set, but there are no `finish.shots`", "use [0]"
    # Checked now rather than after the last step.
    if is_path(finish.suite):
        if not is_url(finish.suite) and not os.path.isfile(finish.suite):
            yield "finish.suite", f"no such suite file: `{shown(finish.suite)}`", None
        return
    suites = {**shipped("evals/suites"), **shipped("evals/suites/tasks")}
    if finish.suite not in suites:
        hint = "shipped: " + ", ".join(f"`{name}`" for name in suites)
        yield "finish.suite", f"no shipped suite is called `{shown(finish.suite)}`", hint


def _heldout(recipe: Recipe, mixture: Mixture) -> Found:
    if mixture.heldout_frac:
        return
    if (steps := recipe.every.heldout_steps) is not None:
        what = (
            "the mixture keeps no document out of training (`heldout_frac` 0), but "
            f"`every.heldout_steps` is {steps}"
        )
        yield "every.heldout_steps", what, "set it to null, or raise `heldout_frac` in the mixture"
    if recipe.finish.suite == "quick":
        what = (
            "the quick suite is made of held-out documents, but the mixture keeps none "
            "(`heldout_frac` 0)"
        )
        yield "finish.suite", what, "raise `heldout_frac` in the mixture"
