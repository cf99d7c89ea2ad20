"""The section `moe.adaptive_capacity` of a recipe: capacity that follows what routers drop."""

from glamcli.config.settings import Count, Fraction, Positive, Settings


class AdaptiveCapacity(Settings):
    """Training with a lower capacity factor than `moe.capacity_factor` as long as that drops little
    enough (docs/recipes.md). A run begins with `moe.capacity_factor`, the largest."""

    lower_factors: tuple[Positive, ...]
    """the other capacity factors, each of which is a program of its own, compiled at first use."""
    max_dropped_frac: Fraction = 0.2
    """choices that may be dropped, of all that are asked for, in the expert layer that drops most:
    above it the factor rises, and it falls where a lower one would drop at most 0.8 of this. With
    two experts per token at factor 2.0 the quick start drops 0.34 at step 10 and 0.19 at step 100;
    the default is what its routers keep to once they have settled."""
    mean_steps: Count = 50
    """how many steps the compared means go over, and before the first change."""
