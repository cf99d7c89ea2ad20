"""What a run takes: days, chip-hours, money and energy from the time of a step (GLaM section 5).

Estimates as good as the step time they start from; the price and the power per chip are inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from glamcli.config.chips import Chip
from glamcli.config.schema import Recipe
from glamcli.config.sizes import Flops, tokens_per_step

WATTS_PER_CHIP = 326.0
PUE = 1.11
"""Measured power of a system per TPU v4 chip, and what a data centre adds (GLaM, by way of
arXiv 2104.10350's method)."""

PAPER = {
    "run": "GLaM 64B/64E on 1,024 TPU v4 chips",
    "tokens": 600e9,
    "mwh": 456.0,
    "half_tokens": 280e9,
    "half_mwh": 213.0,
    "half_hours": 574.0,
}
"""The paper's own figures."""


@dataclass(frozen=True)
class Cost:
    """A whole run at a given step time."""

    step_seconds: float
    tokens_per_second: float
    utilization_frac: float
    """useful operations of active parameters over the peak of all chips."""
    days: float
    chip_hours: float
    dollars: float | None
    mwh: float


def run_cost(
    recipe: Recipe,
    flops: Flops,
    chip: Chip,
    num_chips: int,
    step_seconds: float,
    *,
    price: float | None,
    watts: float,
    pue: float,
) -> Cost:
    """The cost of all steps of the recipe; `price` is per chip and hour."""
    tokens = tokens_per_step(recipe)
    hours = recipe.train.steps * step_seconds / 3600
    return Cost(
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        utilization_frac=flops.training * tokens / step_seconds / (num_chips * chip.peak),
        days=hours / 24,
        chip_hours=num_chips * hours,
        dollars=None if price is None else price * num_chips * hours,
        mwh=num_chips * hours * watts * pue / 1e6,
    )
