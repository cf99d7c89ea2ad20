"""Flags of the TPU compiler tried on a recipe's step, ranked by the estimated time.

Each candidate of `config/xla_flags.py` is compiled alone, then those that help together, the best
first. Nobody has run them: what a flag saves is as good as the estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from glamcli.config.schema import Recipe
from glamcli.config.xla_flags import XlaFlag, tunable_flags
from glamcli.errors import GlamError, PlanError
from glamcli.plan.cost import Prices
from glamcli.plan.planner import Plan, make_plan
from glamcli.plan.topology import NoCompiler, Target

HELPS = 0.002
"""Share of a step that a flag must save to be tried together with others."""


@dataclass(frozen=True)
class Trial:
    """The step with some flags beside the recipe's own; none for the recipe as it is."""

    flags: tuple[XlaFlag, ...]
    plan: Plan | None
    """None where it was not compiled, does not fit, or the compiler refuses the flags."""
    why: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {flag.name: flag.value for flag in self.flags}

    @property
    def words(self) -> str:
        """The flags for a reader."""
        each = (f"{name}={_yaml(value)}" for name, value in self.settings.items())
        return " ".join(each) or "as in the recipe"

    @property
    def seconds(self) -> float:
        """Of a step, by estimate."""
        assert self.plan is not None
        assert self.plan.time is not None
        return self.plan.time.total


def tune(
    recipe: Recipe, target: Target, prices: Prices, tell: Callable[[str], None]
) -> Iterator[Trial]:
    """The recipe as it is, then every candidate and the promising ones together, as they become
    known. `tell` is called with what is compiled next.

    Raises: PlanError when the target is no TPU, or the recipe as it is does not fit it.
    """
    if target.kind != "tpu" or target.chip is None or target.chip.clock is None:
        what = "`--tune` tries flags of the TPU compiler, and ranks them by its estimates of time"
        raise PlanError(what, "use a TPU slice as `--target`, of a chip whose `clock` is known")
    tell("the recipe as it is")
    first = Trial((), make_plan(recipe, target, prices))
    yield first
    assert first.plan is not None
    sent = {kind for kind, *_ in first.plan.collectives}
    found, trials = tunable_flags(target.chip.name), []
    for number, flag in enumerate(found, 1):
        if flag.name in recipe.runtime.xla_flags:
            yield Trial((flag,), None, "the recipe sets it")
        elif flag.collective is not None and flag.collective not in sent:
            yield Trial((flag,), None, f"the step has no {flag.collective}")
        else:
            trials.append(_try((flag,), recipe, target, prices, f"{number} of {len(found)}", tell))
            yield trials[-1]
    better = [t for t in trials if t.plan and t.seconds < (1 - HELPS) * first.seconds]
    better.sort(key=lambda trial: trial.seconds)
    for number in range(2, len(better) + 1):
        flags = tuple(flag for trial in better[:number] for flag in trial.flags)
        yield _try(flags, recipe, target, prices, f"the best {number} together", tell)


def _try(
    flags: tuple[XlaFlag, ...],
    recipe: Recipe,
    target: Target,
    prices: Prices,
    words: str,
    tell: Callable[[str], None],
) -> Trial:
    trial = Trial(flags, None)
    tell(f"{words}: {trial.words}")
    more = {"xla_flags": recipe.runtime.xla_flags | trial.settings}
    runtime = recipe.runtime.model_copy(update=more)
    try:
        plan = make_plan(recipe.model_copy(update={"runtime": runtime}), target, prices)
    except NoCompiler:
        raise
    except GlamError as error:
        return Trial(flags, None, error.what)
    return Trial(flags, plan)


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that fit, fastest first; of equals the one with fewer flags."""
    fitting = (trial for trial in trials if trial.plan is not None)
    return sorted(fitting, key=lambda trial: (trial.seconds, len(trial.flags)))


def recipe_lines(best: Trial, chosen_by: str) -> list[str]:
    """Lines of a recipe that set the flags, with who chose them and why."""
    return [
        "runtime:",
        f"  xla_flags: # {chosen_by}",
        *(f"    {f.name}: {_yaml(f.value)} # {f.reason}" for f in best.flags),
    ]


def _yaml(value: Any) -> str:
    return str(value).lower()
