"""What a run takes: days, chip-hours, money and energy from the time of a step (GLaM section 5).

Estimates as good as the step time they start from; the price and the power per chip are inputs.
"""

from dataclasses import dataclass

from glamcli.config.chips import PUE, WATTS_PER_CHIP
from glamcli.config.schema import Recipe
from glamcli.config.sizes import flops_per_token, tokens_per_step
from glamcli.plan.topology import Target

PAPER = (
    "456 MWh for 600B tokens; 213 MWh and 574 hours for 280B (GLaM 64B/64E on 1,024 TPU v4 chips)"
)
"""The paper's own figures."""


@dataclass(frozen=True)
class Prices:
    """What a chip costs per hour and draws in watts; without `dollars` the table's price."""

    dollars: float | None = None
    watts: float = WATTS_PER_CHIP
    pue: float = PUE


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


def run_cost(recipe: Recipe, target: Target, step_seconds: float, prices: Prices) -> Cost:
    """The cost of all steps of the recipe on a target of known chips."""
    chip, num_chips = target.chip, target.num_chips
    assert chip is not None
    price = chip.price if prices.dollars is None else prices.dollars
    tokens, flops = tokens_per_step(recipe), flops_per_token(recipe)
    hours = recipe.train.steps * step_seconds / 3600
    return Cost(
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        utilization_frac=flops.training * tokens / step_seconds / (num_chips * chip.peak),
        days=hours / 24,
        chip_hours=num_chips * hours,
        dollars=None if price is None else price * num_chips * hours,
        mwh=num_chips * hours * prices.watts * prices.pue / 1e6,
    )
