"""Layouts of a recipe on a target, ranked: arithmetic on all of them, the compiler on the best.

Only what leaves the run's results alone is free to choose for `best`: the mesh and what is
recomputed. Rows per step and capacity change what is trained, so their variants are ranked beside
it, for a person to weigh.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from glamcli.config import sharding
from glamcli.config.chips import Chip
from glamcli.config.nearest import divisors
from glamcli.config.schema import Recipe
from glamcli.config.sizes import count, tokens_per_step
from glamcli.errors import GlamError, PlanError
from glamcli.plan import formula
from glamcli.plan.memory import state_bytes
from glamcli.plan.network import Network
from glamcli.plan.planner import Plan, Prices, make_plan
from glamcli.plan.topology import Target, slice_sizes, target_of

MAX_MODEL = 64
REMAT = ("none", "attention", "dots", "full")
SLACK = 1.0
"""A step whose bytes by arithmetic are above this multiple of the memory is not compiled:
arithmetic errs on the low side."""


@dataclass(frozen=True)
class Candidate:
    """One way to run the recipe; `settings` are the `--set` words that make it."""

    recipe: Recipe
    settings: tuple[str, ...]
    same_run: bool
    """whether it trains exactly what the recipe trains."""
    bytes: int
    seconds_per_token: float
    """by arithmetic."""


@dataclass
class SearchResult:
    """What a search looked at, and what became of it."""

    plans: list[tuple[Candidate, Plan]] = field(default_factory=list)
    """compiled and fitting, fastest per token first."""
    refused: list[tuple[Candidate, str]] = field(default_factory=list)
    """compiled, and why not."""
    dropped: Counter[str] = field(default_factory=Counter)
    """never compiled, by reason."""

    @property
    def num_compiled(self) -> int:
        return len(self.plans) + len(self.refused)

    @property
    def best(self) -> tuple[Candidate, Plan] | None:
        """The fastest that trains what the recipe trains."""
        return next((pair for pair in self.plans if pair[0].same_run), None)


def search(
    recipe: Recipe,
    target: Target,
    prices: Prices,
    *,
    num_compiled: int,
    tell: Callable[[str], None],
) -> SearchResult:
    """Compiles the `num_compiled` most promising layouts, and ranks them by the time of a token.

    Two of three go to layouts that leave the run as it is. `tell` hears what is compiled next.

    Raises: PlanError when nothing fits by arithmetic.
    """
    found = SearchResult()
    ranked = sorted(candidates(recipe, target, found.dropped), key=lambda c: c.seconds_per_token)
    if not ranked:
        raise _nothing(target, found.dropped)
    same = _spread([each for each in ranked if each.same_run])
    others = _spread([each for each in ranked if not each.same_run])
    num_others = min(len(others), num_compiled // 3 if same else num_compiled)
    chosen = same[: num_compiled - num_others] + others[:num_others]
    slower = len(ranked) - len(chosen)
    if slower:
        found.dropped["slower by arithmetic than those compiled"] = slower
    for number, candidate in enumerate(chosen, 1):
        tell(f"{number} of {len(chosen)}: {' '.join(candidate.settings) or 'as in the recipe'}")
        try:
            found.plans.append((candidate, make_plan(candidate.recipe, target, prices)))
        except GlamError as error:
            found.refused.append((candidate, error.what))
    found.plans.sort(key=lambda pair: _per_token(pair[1]))
    return found


def _spread(ranked: list[Candidate]) -> list[Candidate]:
    """Those up to twice as slow as the best first, and of them the best of every size of `model`,
    then their seconds, and so on: how splitting the model cuts products up is what arithmetic
    knows least about."""
    seen: Counter[int] = Counter()
    places = []
    for candidate in ranked:
        model = candidate.recipe.mesh.model
        close = candidate.seconds_per_token <= 2 * ranked[0].seconds_per_token
        places.append((seen[model] if close else len(ranked), len(places)))
        seen[model] += 1
    return [ranked[index] for _, index in sorted(places)]


def candidates(
    recipe: Recipe, target: Target, dropped: Counter[str], *, vary_run: bool = True
) -> Iterator[Candidate]:
    """Every variant that arithmetic does not rule out; the others are counted by reason.

    Without `vary_run` only those that train exactly what the recipe trains.
    """
    chip = target.chip
    if chip is None:
        raise PlanError("a search needs a target whose speed is known", "use a TPU slice or GPUs")
    for settings, same_run in _variants(recipe, target):
        if not (same_run or vary_run):
            continue
        changed = _with(recipe, settings)
        shape = _shape(changed)
        why = _impossible(changed, shape)
        if why:
            dropped[why] += 1
            continue
        state = state_bytes(changed, shape)
        guess = formula.estimate(changed, state, Network(target, None, shape))
        if guess.total > SLACK * chip.usable_bytes:
            dropped["too large by arithmetic"] += 1
            continue
        words = tuple(
            f"{key}={value}" for key, value in settings.items() if value != _at(recipe, key)
        )
        yield Candidate(
            changed, words, same_run, guess.total, guess.seconds / tokens_per_step(changed)
        )


def all_targets(
    recipe: Recipe,
    chips: dict[str, Chip],
    prices: Prices,
    tell: Callable[[str], None],
) -> Iterator[tuple[Chip, Plan | None, str]]:
    """For every TPU the smallest slice that the compiler finds the recipe to fit, or why none.

    Sizes on which no layout fits by arithmetic are passed over. On the next one the layout that
    arithmetic likes best is compiled; a refusal moves on. GPUs are left out: nothing compiles for
    them here.
    """
    for chip in chips.values():
        if chip.family == "tpu":
            yield chip, *_smallest(recipe, chip, prices, tell)


def _smallest(
    recipe: Recipe, chip: Chip, prices: Prices, tell: Callable[[str], None]
) -> tuple[Plan | None, str]:
    why = "no slice is large enough by arithmetic"
    state = 2 * 4 * count(recipe).total  # float32 weights and gradients, over all devices at best
    passed = 0
    for size in slice_sizes(chip):
        target = target_of(chip, size)
        fitting: list[Candidate] = []
        if state <= target.num_devices * chip.usable_bytes:
            fitting = list(candidates(recipe, target, Counter(), vary_run=False))
        if not fitting:
            passed += 1
            continue
        best = min(fitting, key=lambda each: each.seconds_per_token)
        tell(
            f"{target.name}: {' '.join(best.settings) or 'as in the recipe'} "
            f"({passed} smaller sizes are too small by arithmetic)"
        )
        try:
            return make_plan(best.recipe, target, prices), ""
        except PlanError as error:
            why = f"{target.name}: {error.what}"
    return None, why


def _variants(recipe: Recipe, target: Target) -> Iterator[tuple[dict[str, object], bool]]:
    """Settings to try, and whether they leave the run's results as they are."""
    moe, rows = recipe.moe, recipe.batch.rows
    for shape in _meshes(recipe, target):
        for remat in REMAT:
            base = {**shape, "train.remat": remat}
            yield base, True
            for more in (rows // 2, rows * 2):
                if more:
                    yield {**base, "batch.rows": more}, False
            if moe is not None:
                for factor in sorted({1.0, 1.25, 2.0} - {moe.capacity_factor}):
                    yield {**base, "moe.capacity_factor": factor}, False


def _meshes(recipe: Recipe, target: Target) -> Iterator[dict[str, object]]:
    """Every way to lay a slice's devices over data, expert and model; stages stay."""
    devices = target.num_devices // (target.num_slices * recipe.mesh.stage)
    experts = recipe.moe.num_experts if recipe.moe else 1
    for model in divisors(devices):
        for expert in divisors(devices // model):
            if model <= MAX_MODEL and experts % expert == 0:
                yield {
                    "mesh.slice": target.num_slices,
                    "mesh.data": devices // model // expert,
                    "mesh.expert": expert,
                    "mesh.model": model,
                }


def _impossible(recipe: Recipe, shape: dict[str, int]) -> str | None:
    """Why arithmetic rules a layout out, in the words of a summary."""
    if next(sharding.indivisible_widths(recipe, shape), None):
        return "with widths that do not divide over the mesh"
    if next(sharding.indivisible_rows(recipe, shape), None):
        return "with rows that do not divide over the data shards"
    tokens = recipe.batch.rows // recipe.batch.accumulate * recipe.batch.row_tokens
    if recipe.moe and tokens % (recipe.moe.group_tokens * sharding.num_shards(recipe, shape)):
        return "with routing groups that do not divide over the data shards"
    return None


def _with(recipe: Recipe, settings: dict[str, object]) -> Recipe:
    changed = recipe.model_dump()
    changed["mesh"]["auto"] = False
    for key, value in settings.items():
        section, name = key.split(".")
        changed[section][name] = value
    return Recipe.model_validate(changed)


def _at(recipe: Recipe, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _shape(recipe: Recipe) -> dict[str, int]:
    mesh = recipe.mesh
    assert mesh.data != "auto"
    return {
        "slice": mesh.slice,
        "stage": mesh.stage,
        "data": mesh.data,
        "expert": mesh.expert,
        "model": mesh.model,
    }


def _per_token(plan: Plan) -> float:
    seconds = math.inf if plan.time is None else plan.time.total
    return seconds / tokens_per_step(plan.recipe)


def _nothing(target: Target, dropped: Counter[str]) -> PlanError:
    reasons = ", ".join(f"{number} {why}" for why, number in dropped.most_common())
    return PlanError(
        f"no layout of the recipe fits `{target.name}` ({reasons})",
        "`--all-targets` finds the smallest slice that does",
    )
