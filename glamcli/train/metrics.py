"""From the sums of a step to the numbers that are shown and written.

`summarise` takes the means, once, last. What routers in trouble look like is in
`router_alarms.py`, the files are in `metric_files.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glamcli.config.schema import Recipe

LossSums = tuple[float, int]
"""Summed loss in nats, and the number of targets it is summed over."""

FAILED_TASKS = "eval/failed_tasks"
"""The key of the number of tasks that could not be scored, beside the scores of the others."""

STDERR = "_stderr"
"""What the key of a score's standard error has after the score's own."""

DEVIATIONS = ("loss_deviations", "grad_norm_deviations", "update_norm_deviations")

# Router statistics in the summary, without `_loss`; those of the layers are `<name>_by_layer`.
ROUTING = (
    *("balance_loss", "dropped_frac", "dropped_first_frac", "dropped_second_frac"),
    *("router_entropy_nats", "router_z_loss"),
)


def add_losses(
    totals: Mapping[str, LossSums], sums: Mapping[str, Any], source_names: Sequence[str]
) -> dict[str, LossSums]:
    """Totals (summed nats, number of targets) of all targets (`""`) and of every source, after
    another step with these sums."""
    names = ("", *source_names)
    nats = (sums["loss_nats"], *sums["source_nats"])
    counts = (sums["num_targets"], *sums["source_targets"])
    before = [totals.get(name, (0.0, 0)) for name in names]
    return {
        name: (total + float(more), num + int(count))
        for name, (total, num), more, count in zip(names, before, nats, counts, strict=True)
    }


def summarise(
    sums: Mapping[str, Any], losses: Mapping[str, LossSums], recipe: Recipe
) -> dict[str, Any]:
    """A line of numbers after one training step, flat, in the order they are written: those of
    docs/metrics.md, None where they are not finite or have no targets.

    `loss`, `perplexity` and `loss/<source>` are means over the real targets of all steps in
    `losses` (`add_losses`), everything else is of this step.
    """
    num_targets = int(sums["num_targets"])
    means = {name: _mean(*total) for name, total in losses.items()}
    loss = means.pop("")
    summary: dict[str, Any] = {
        "step": int(sums["step"]),
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
        **{f"loss/{name}": mean for name, mean in means.items()},
        "total_loss": finite(sums["loss"]),
        "softmax_z": _mean(sums["z_sum"], num_targets),
        "learning_rate": finite(sums["learning_rate"]),
        "grad_norm": finite(sums["grad_norm"]),
        "update_norm": finite(sums["update_norm"]),
        "param_norm": finite(sums["param_norm"]),
        **dict(zip(DEVIATIONS, map(finite, sums["deviations"]), strict=True)),
        "num_targets": num_targets,
        "padding_frac": 1.0 - num_targets / (recipe.batch.rows * recipe.batch.row_tokens),
        "spike": int(sums["spike"]),
        "bad_steps": int(sums["bad_steps"]),
        "bad_steps_total": int(sums["bad_steps_total"]),
    }
    if sums["routing"]:
        summary |= _routing(sums["routing"])
    return summary


def _routing(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Router statistics [expert layers, ...] as means and lists."""
    layers = {n.removesuffix("_loss"): np.asarray(stats[n], np.float64) for n in ROUTING}
    served = ("unserved_frac", "served_one_frac", "served_two_frac")
    layers |= dict(zip(served, np.asarray(stats["served_3"], np.float64).T, strict=True))
    layers["max_first_frac"] = np.asarray(stats["first_E"], np.float64).max(axis=1)
    load = np.asarray(stats["wanted_E"], np.float64)
    of_factors = {}
    if "dropped_F" in stats:
        worst = np.asarray(stats["dropped_F"], np.float64).max(axis=0)
        of_factors["dropped_frac_by_factor"] = [finite(value) for value in worst]
    dead = np.sum(load == 0, axis=1)
    return {
        **{name: finite(values.mean()) for name, values in layers.items()},
        **of_factors,
        "dead_experts": int(dead.sum()),
        **{f"{name}_by_layer": [finite(v) for v in vs] for name, vs in layers.items()},
        "dead_experts_by_layer": [int(count) for count in dead],
        "load_by_layer": [[finite(share) for share in layer] for layer in load],
    }


def _mean(total: Any, count: Any) -> float | None:
    return finite(float(total) / int(count)) if int(count) else None


def finite(value: Any) -> float | None:
    """The number, for JSON: None where it is none or infinite."""
    return float(value) if math.isfinite(value) else None
