"""Which capacity factor each step is trained with (`moe.adaptive_capacity`).

Queues of experts are counted before capacity cuts them, so every step measures what each factor
would have dropped of its choices. A factor is chosen from means of these numbers, which are the
same in every process, and holds from `LAG` steps later on: by then they have been read, in every
process and in a run that was killed in between. The steps from which factors hold are part of a
checkpoint, as stages of the mixture are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from glamcli.config.schema import Recipe
from glamcli.config.sizes import capacity_factors

LAG = 2
"""A step is dispatched before the numbers of the step before it are read."""
HEADROOM = 0.8
"""A lower factor has to drop at most so much of what may be dropped."""


class CapacityStage(NamedTuple):
    """A capacity factor and the first step that it holds for."""

    from_step: int
    factor: float


class Capacity:
    """The capacity factors of a run so far; `saved` is what a checkpoint has of them."""

    def __init__(self, recipe: Recipe, saved: Mapping[str, Any]):
        moe = recipe.moe
        self._settings = moe and moe.adaptive_capacity
        self._factors = capacity_factors(moe) if moe else ()
        first = [(1, moe.capacity_factor)] if moe and self._settings else []
        self.stages = [CapacityStage(*each) for each in saved.get("stages", first)]
        self._means_LF: Any = np.array(saved.get("means", 0.0))
        self._num_steps: int = saved.get("num_steps", 0)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint carries; nothing without `moe.adaptive_capacity`."""
        if self._settings is None:
            return {}
        stages = [list(each) for each in self.stages]
        return {"stages": stages, "means": self._means_LF.tolist(), "num_steps": self._num_steps}

    def at(self, step: int) -> float | None:
        """The factor in force at a step; None without `moe.adaptive_capacity`."""
        return next((each.factor for each in reversed(self.stages) if each.from_step <= step), None)

    def notice(self, step: int, sums: Mapping[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
        """Takes the sums of a step, and adds `capacity_factor` to its summary.

        Returns `capacity_switch` for the metrics when another factor comes into force. A step whose
        update was skipped does not count.
        """
        if self._settings is None:
            return {}
        summary["capacity_factor"] = self.at(step)
        if sums["bad_steps"]:
            return {}
        self._num_steps += 1
        dropped_LF = np.asarray(sums["routing"]["dropped_F"], np.float64)
        mean_steps = self._settings.mean_steps
        self._means_LF = self._means_LF + (dropped_LF - self._means_LF) / min(
            self._num_steps, mean_steps
        )
        if self._num_steps < mean_steps:
            return {}
        dropped_F, now = self._means_LF.max(axis=0).tolist(), self.stages[-1].factor
        factor = factor_within(self._factors, dropped_F, now, self._settings.max_dropped_frac)
        if factor == now:
            return {}
        self.stages.append(CapacityStage(step + LAG, factor))
        dropped = dropped_F[self._factors.index(factor)]
        return {"capacity_switch": {**self.stages[-1]._asdict(), "dropped_frac": dropped}}


def switch_text(switch: Mapping[str, Any]) -> str:
    """What `Capacity.notice` returned, in words."""
    stage = switch["capacity_switch"]
    dropped = f"{stage['dropped_frac']:.1%} of choices dropped by now, in the worst expert layer"
    return f"capacity factor {stage['factor']:g} from step {stage['from_step']} on ({dropped})"


def factor_within(
    factors: Sequence[float], dropped: Sequence[float], now: float, max_dropped: float
) -> float:
    """The smallest of these ascending factors that drops at most `max_dropped`, the largest where
    none does; but below the factor `now` only one that drops at most `HEADROOM` of it."""

    def smallest(limit: float) -> float:
        pairs = zip(factors, dropped, strict=True)
        return next((factor for factor, frac in pairs if frac <= limit), factors[-1])

    needed = smallest(max_dropped)
    return needed if needed > now else min(now, smallest(HEADROOM * max_dropped))
