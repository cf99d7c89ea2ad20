"""Layouts of a recipe on a target, ranked: arithmetic on all of them, the compiler on the best."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from glamcli.config.chips import Chip
from glamcli.config.schema import Recipe
from glamcli.errors import GlamError, PlanError
from glamcli.plan.candidates import Candidate, candidates, fastest, fitting
from glamcli.plan.cost import Prices
from glamcli.plan.planner import Plan, make_plan
from glamcli.plan.topology import NoCompiler, Target, slice_sizes, target_of


@dataclass
class SearchResult:
    """What a search considered, and the outcome of each."""

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

    Two of three go to layouts that leave the run as it is. `tell` is called with what is compiled
    next.

    Raises: PlanError when nothing fits by arithmetic.
    """
    found = SearchResult()
    ranked = sorted(candidates(recipe, target, found.dropped), key=lambda c: c.seconds_per_token)
    if not ranked:
        reasons = ", ".join(f"{number} {why}" for why, number in found.dropped.most_common())
        raise PlanError(
            f"no layout of the recipe fits `{target.name}` ({reasons})",
            "`--all-targets` finds the smallest slice that does",
        )
    same = _spread([each for each in ranked if each.same_run])
    others = _spread([each for each in ranked if not each.same_run])
    num_others = min(len(others), num_compiled // 3 if same else num_compiled)
    chosen = same[: num_compiled - num_others] + others[:num_others]
    if slower := len(ranked) - len(chosen):
        found.dropped["slower by arithmetic than those compiled"] = slower
    for number, candidate in enumerate(chosen, 1):
        tell(f"{number} of {len(chosen)}: {candidate.words}")
        try:
            found.plans.append((candidate, make_plan(candidate.recipe, target, prices)))
        except NoCompiler:
            raise
        except GlamError as error:
            found.refused.append((candidate, error.what))
    found.plans.sort(key=lambda pair: pair[1].seconds_per_token)
    return found


def _spread(ranked: list[Candidate]) -> list[Candidate]:
    """Those up to twice as slow as the best first, and of them the best of every size of `model`,
    then their seconds, and so on: how splitting the model cuts products up is what arithmetic
    knows least about."""
    seen: Counter[int] = Counter()
    order = []
    for candidate in ranked:
        model = candidate.recipe.mesh.model
        close = candidate.seconds_per_token <= 2 * ranked[0].seconds_per_token
        order.append((seen[model] if close else len(ranked), len(order)))
        seen[model] += 1
    return [ranked[index] for _, index in sorted(order)]


def all_targets(
    recipe: Recipe,
    chips: dict[str, Chip],
    prices: Prices,
    tell: Callable[[str], None],
) -> Iterator[tuple[Chip, Plan | None, str]]:
    """For every TPU the smallest slice that the compiler finds the recipe to fit, or why none
    (docs/planning.md). GPUs are left out: nothing compiles for them here."""
    for chip in chips.values():
        if chip.family != "tpu":
            continue
        plan, why, skipped = None, "no slice is large enough by arithmetic", 0
        for target in (target_of(chip, size) for size in slice_sizes(chip)):
            if (best := fastest(fitting(recipe, target))) is None:
                skipped += 1
                continue
            smaller = f"{skipped} smaller sizes are too small by arithmetic"
            tell(f"{target.name}: {best.words} ({smaller})")
            try:
                plan, why = make_plan(best.recipe, target, prices), ""
                break
            except NoCompiler:
                raise
            except PlanError as error:
                why = f"{target.name}: {error.what}"
        yield chip, plan, why
