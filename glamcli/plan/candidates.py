"""Layouts of a recipe on a target by arithmetic alone: what a search compiles, what a hint advises.

Only what leaves the run's results alone is free to choose: the mesh and what is recomputed. Rows
per step and capacity change what is trained; their variants say so.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from glamcli.config import sharding
from glamcli.config.nearest import divisors
from glamcli.config.schema import Recipe
from glamcli.config.sizes import count, tokens_per_step
from glamcli.errors import PlanError
from glamcli.plan import formula
from glamcli.plan.memory import state_bytes
from glamcli.plan.network import Network
from glamcli.plan.topology import Target, larger_targets

MAX_MODEL = 64
TOO_LARGE = "too large by arithmetic"
REMAT = ("none", "attention", "dots", "projections", "full")
SURE = 0.65
"""Share of a device's memory up to which advice trusts the bytes of arithmetic, which err on the
low side (docs/decisions/0006)."""


@dataclass(frozen=True)
class Candidate:
    """One way to run the recipe; `settings` are the `--set` values that make it."""

    recipe: Recipe
    settings: tuple[str, ...]
    same_run: bool
    """whether it trains exactly what the recipe trains."""
    seconds_per_token: float
    """by arithmetic."""

    @property
    def words(self) -> str:
        """The settings for a reader."""
        return " ".join(self.settings) or "as in the recipe"

    @property
    def options(self) -> str:
        """The settings as options of the command line."""
        return " ".join(f"--set {each}" for each in self.settings)


def candidates(
    recipe: Recipe,
    target: Target,
    dropped: Counter[str],
    *,
    vary_run: bool = True,
    room: float = 1.0,
) -> Iterator[Candidate]:
    """Every variant that arithmetic does not rule out; the others are counted by reason.

    Without `vary_run` only those that train exactly what the recipe trains. `room` is the share of
    a device's memory that a variant may take.
    """
    chip = target.chip
    if chip is None:
        raise PlanError("a search needs a target whose speed is known", "use a TPU slice or GPUs")
    least = 2 * 4 * count(recipe).total  # float32 weights and gradients, over all devices at best
    if not vary_run and least > room * target.num_devices * chip.usable_bytes:
        dropped[TOO_LARGE] += 1
        return
    # `data: auto` works out to the same.
    is_worked_out = recipe.mesh.data == "auto" and not recipe.mesh.auto
    for settings, same_run in _variants(recipe, target):
        if not (same_run or vary_run):
            continue
        changed = _with(recipe, settings)
        shape = sharding.known_sizes(changed.mesh)
        if why := _impossible(changed, shape):
            dropped[why] += 1
            continue
        state = state_bytes(changed, shape)
        guess = formula.estimate(changed, state, Network(target, None, shape))
        if guess.total_bytes > room * chip.usable_bytes:
            dropped[TOO_LARGE] += 1
            continue
        words = tuple(
            f"{key}={str(value).lower()}"
            for key, value in settings.items()
            if value != attrgetter(key)(recipe) and not (key == "mesh.data" and is_worked_out)
        )
        seconds = guess.time.total / tokens_per_step(changed)
        yield Candidate(changed, words, same_run, seconds)


def fastest(found: Iterable[Candidate]) -> Candidate | None:
    """The fastest by arithmetic."""
    return min(found, key=lambda each: each.seconds_per_token, default=None)


def fitting(
    recipe: Recipe, target: Target, room: float = 1.0, dropped: Counter[str] | None = None
) -> Iterator[Candidate]:
    """Layouts that train what the recipe trains and take at most `room` of a device's memory; the
    others are counted in `dropped` by reason."""
    dropped = Counter() if dropped is None else dropped
    return candidates(recipe, target, dropped, vary_run=False, room=room)


def remedy(recipe: Recipe, target: Target) -> str | None:
    """Advice for a step that does not fit: a layout that does, on the target or a larger one.

    None where every layout is impossible for another reason than its memory.
    """
    dropped: Counter[str] = Counter()
    for parts in (1, 2, 4, 8, 16, 32):
        accumulate = parts * recipe.batch.accumulate
        found = fitting(_with(recipe, {"batch.accumulate": accumulate}), target, SURE, dropped)
        if best := fastest(each for each in found if each.settings or parts > 1):
            more = f"--set batch.accumulate={accumulate} " if parts > 1 else ""
            return f"{more}{best.options}".strip() + " fits by arithmetic"
    if TOO_LARGE not in dropped:
        return None  # no layout failed by its memory
    for larger in larger_targets(target):
        if best := fastest(fitting(recipe, larger, SURE)):
            options = f"--target {larger.name} {best.options}".strip()
            return f"`{target.name}` is too small by arithmetic; {options} is not"
    return f"`{target.name}` and all larger ones of its kind are too small by arithmetic"


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
            if moe is not None and moe.adaptive_capacity is None:
                for factor in sorted({1.0, 1.25, 2.0} - {moe.capacity_factor}):
                    yield {**base, "moe.capacity_factor": factor}, False


def _meshes(recipe: Recipe, target: Target) -> Iterator[dict[str, object]]:
    """Every way to lay a target's devices over data, expert and model; stages stay."""
    devices, rest = divmod(target.num_devices, target.num_slices * recipe.mesh.stage)
    experts = recipe.moe.num_experts if recipe.moe else 1
    for model in divisors(devices) if not rest else ():
        for expert in divisors(devices // model):
            if model <= MAX_MODEL and experts % expert == 0:
                yield {
                    "mesh.auto": False,
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
    for key, value in settings.items():
        section, name = key.split(".")
        changed[section][name] = value
    return Recipe.model_validate(changed)
