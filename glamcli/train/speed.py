"""How fast a run trains its model, measured against what its chips could do."""

from collections.abc import Sequence
from typing import Any

from glamcli.config.chips import chip_of
from glamcli.config.schema import Recipe
from glamcli.config.sizes import flops_per_token

SPEED_KEYS = ("mfu", "model_flops_per_second", "tokens_per_second_per_chip")
"""Keys in the metrics, on devices of a known chip."""


def model_speed(
    recipe: Recipe, devices: Sequence[Any], tokens_per_second: float
) -> dict[str, float]:
    """The numbers of `SPEED_KEYS` at this speed of all devices together; none on a device that the
    table of chips does not know.

    MFU is model FLOPs utilization as PaLM defines it (arXiv 2204.02311, appendix B): the operations
    that the model needs per second, whatever the hardware executes for them, over the chips' peak
    in bfloat16. Needed are those of `Flops.training`, for real targets: three forward passes of
    attention, dense layers, a token's own experts, routers and logits. Recomputation
    (`train.remat`), empty slots of experts and the optimizer are not. Where PaLM counts every pair
    of positions of a row, only those under the causal mask are counted here, so this MFU is the
    lower one.
    """
    chip = chip_of(devices[0].device_kind) if len(devices) else None
    if chip is None:
        return {}
    num_chips = len(devices) / chip.devices
    flops = tokens_per_second * flops_per_token(recipe).training
    numbers = (flops / (num_chips * chip.peak), flops, tokens_per_second / num_chips)
    return dict(zip(SPEED_KEYS, (float(f"{n:.6g}") for n in numbers), strict=True))
