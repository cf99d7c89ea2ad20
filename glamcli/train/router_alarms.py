"""Alarms of routers: which expert layer is in trouble, by how much, and which setting to change.

Single steps scatter, so means are compared with the limits (`guard.routers`). An alarm is raised
once, and again only after its mean has been back at `CLEAR` of the limit: one that plays about a
limit is one alarm. Means and alarms are part of a checkpoint, so that a resumed run raises those of
an uninterrupted one.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glamcli.config.schema import Recipe
from glamcli.errors import first_of

CLEAR = 0.8
SHOWN_EXPERTS = 8

_Means = dict[str, NDArray[np.float64]]

_BALANCE = "raise `moe.balance_coef` (now {moe.balance_coef:g})"
_CAPACITY = (
    "raise `moe.capacity_factor` (now {moe.capacity_factor:g}) "
    "or `moe.balance_coef` (now {moe.balance_coef:g})"
)
_KINDS = {
    "first_frac": (
        "the most popular expert of {E} gets {value:.0%} of first choices, in the mean of steps",
        _BALANCE,
    ),
    "starving_frac": ("{starving} of {E} experts get hardly a token ({experts})", _BALANCE),
    "dropped_first_frac": ("{value:.0%} of first choices are dropped", _CAPACITY),
    "dropped_second_frac": ("{value:.0%} of second choices are dropped", _CAPACITY),
    "entropy_frac": (
        "the entropy of the router is {value:.1%} of ln {E}",
        "raise `moe.router_z_coef` (now {moe.router_z_coef:g}) or lower `optimizer.learning_rate`",
    ),
    "balance": ("the balance loss is {value:.3g}, and 1 is ideal", _BALANCE),
}
"""By the name of the limit: what is wrong, and what to do about it."""
_FLOORS = ("starving_frac", "entropy_frac")


class RouterAlarms:
    """The alarms of a run so far; `saved` is what a checkpoint has of them."""

    def __init__(self, recipe: Recipe, saved: Mapping[str, Any]):
        self._moe, self._limits = recipe.moe, recipe.guard.routers
        self._means = {name: np.array(mean) for name, mean in saved.get("means", {}).items()}
        raised = dict(saved.get("raised", ()))
        self._raised = {name: set(raised.get(name, ())) for name in _KINDS}

    def saved(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        means = {name: mean.tolist() for name, mean in self._means.items()}
        raised = {name: sorted(layers) for name, layers in self._raised.items() if layers}
        return {"means": means, "raised": raised}

    def notice(self, summary: dict[str, Any]) -> list[str]:
        """Takes the summary of a step and adds `router_alarms` to it, how many are raised now.

        Returns those that were not before: a text each, with its layer, the limit and the setting
        to change. None for a model without experts.
        """
        if self._moe is None:
            return []
        for name, (values, ideal) in _measured(summary, self._moe.num_experts).items():
            mean = self._means.get(name, np.full_like(values, ideal))
            moved = mean + (values - mean) / self._limits.mean_steps
            self._means[name] = np.where(np.isfinite(values), moved, mean)
        new = [text for name in _KINDS for text in self._check(name)]
        summary["router_alarms"] = sum(map(len, self._raised.values()))
        return new

    def _check(self, name: str) -> list[str]:
        """Raises and clears the alarms of a limit; the texts of new ones."""
        limit, raised = getattr(self._limits, name), self._raised[name]
        if limit is None or name not in self._means:
            raised.clear()
            return []
        mean = self._means[name]
        worst = mean.min(axis=-1) if mean.ndim > 1 else mean
        with np.errstate(divide="ignore"):
            times = limit / worst if name in _FLOORS else worst / limit
        raised.difference_update(np.flatnonzero(times <= CLEAR).tolist())
        new = [index for index in np.flatnonzero(times > 1).tolist() if index not in raised]
        raised.update(new)
        return [f"expert layer {index + 1}: {self._words(name, mean[index])}" for index in new]

    def _words(self, name: str, mean: NDArray[np.float64]) -> str:
        """What is wrong, what to do, and where the limit is."""
        assert self._moe is not None
        (what, advice), limit = _KINDS[name], getattr(self._limits, name)
        below = [str(number) for number, each in enumerate(np.atleast_1d(mean), 1) if each < limit]
        what = what.format(
            E=self._moe.num_experts,
            value=float(np.min(mean)),
            starving=len(below),
            experts=", ".join(first_of(below, SHOWN_EXPERTS)),
        )
        advice = advice.format(moe=self._moe)
        return f"{what}; {advice}; the limit is `guard.routers.{name}` ({limit:g})"


def _measured(summary: Mapping[str, Any], E: int) -> dict[str, tuple[NDArray[np.float64], float]]:
    """By limit: its quantity [expert layers] in the units of the limit, `starving_frac` [expert
    layers, E], not finite where it is unknown; and the ideal."""

    def layers(key: str) -> NDArray[np.float64]:
        return np.array(summary[f"{key}_by_layer"], np.float64)

    measured = {
        "starving_frac": (layers("load") * E, 1.0),
        "dropped_first_frac": (layers("dropped_first_frac"), 0.0),
        "dropped_second_frac": (layers("dropped_second_frac"), 0.0),
        "balance": (layers("balance"), 1.0),
    }
    if E > 2:  # of two experts, one is always the first of half the tokens
        measured["first_frac"] = (layers("max_first_frac"), 1 / E)
    if E > 1:
        measured["entropy_frac"] = (layers("router_entropy_nats") / math.log(E), 1.0)
    return measured
