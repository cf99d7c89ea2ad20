"""Shares of choices that capacity drops and of slots that stay empty, by the router's own code.

    python benchmarks/drops.py
    python benchmarks/drops.py --experts 8 --capacity-factors 1.25 --seed 1

Tokens come with independent normal logits, to which every expert adds one of its own, drawn with
the given deviation: 0 is a uniform router. `load` is the deviation of the experts' shares of
choices, in units of their mean. No model and no text: a trained router's drops are in its run's
metrics.
"""

import argparse

import jax
import jax.numpy as jnp

from glamcli.config.schema import Moe
from glamcli.config.sizes import slots_per_expert
from glamcli.model import routing
from glamcli.model.dispatch import block_rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--group-tokens", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--capacity-factors", type=float, nargs="+", default=[1.0, 1.25, 2.0, 4.0])
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    E, shape = options.experts, (options.groups, options.group_tokens)
    moe = Moe(num_experts=E)
    tokens, experts = jax.random.split(jax.random.key(options.seed))
    real_GS = jnp.ones(shape, bool)
    print(options)
    for skew in options.skews:
        bias_E = skew * jax.random.normal(experts, (E,))
        logits_GSE = jax.random.normal(tokens, (*shape, E)) + bias_E
        for factor in options.capacity_factors:
            slots = slots_per_expert(options.group_tokens, E, factor)
            route, probs_GSE = routing.decide(logits_GSE, real_GS, moe, slots)
            sums = routing.tally(route, logits_GSE, probs_GSE, real_GS, moe.balance_padding)
            stats = routing.summary(sums)
            share_E = stats["wanted_E"] * E
            num_choices = moe.experts_per_token * real_GS.size
            rows = sums["wanted_E"]
            block = block_rows(num_choices, E)
            print(
                f"skew {skew:.1f}  load {jnp.std(share_E):.2f}  factor {factor:4.2f}"
                f"  dropped {stats['dropped_frac']:6.1%}"
                f"  first {stats['dropped_first_frac']:6.1%}"
                f"  second {stats['dropped_second_frac']:6.1%}"
                f"  empty slots {1 - jnp.sum(sums['kept_E']) / (E * shape[0] * slots):6.1%}"
                f"  dropless padding {jnp.sum(-(-rows // block) * block) / jnp.sum(rows) - 1:5.1%}"
            )


main()
