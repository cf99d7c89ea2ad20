"""The section `guard` of a recipe: what is done about numbers that look wrong."""

from typing import Literal

from glamcli.config.settings import Count, CountOrZero, Positive, Settings


class RouterLimits(Settings):
    """When a router is in trouble and a warning says so (docs/metrics.md); null never looks."""

    mean_steps: Count = 50
    """how many steps the compared means go over: each step moves them by 1/mean_steps of the way
    from where they are, at first the ideal, to its own numbers."""
    first_frac: Positive | None = 0.5
    """above: tokens that choose the most popular expert first; with 3 experts or more."""
    starving_frac: Positive | None = 0.1
    """below: choices of the least popular expert, of an even share (1/E)."""
    dropped_first_frac: Positive | None = 0.3
    """above: first choices that are dropped."""
    dropped_second_frac: Positive | None = 0.7
    """above: second choices that are dropped."""
    entropy_frac: Positive | None = 0.02
    """below: entropy of a token's probabilities, of that of a router without preference (ln E)."""
    balance: Positive | None = 2.0
    """above: balance loss, without coefficient; 1 when ideal, E at most."""


class Guard(Settings):
    """What is done when a run's numbers look wrong (docs/decisions/0014)."""

    on_spike: Literal["skip", "rewind", "stop"] = "skip"
    """the update of a step whose loss, gradient or update is far above those of the steps before
    is never applied. Then `skip` goes on and ends the run after `train.max_bad_steps` in a row;
    `rewind` goes back to the newest good checkpoint after as many, and on with later data; `stop`
    ends the run at once, and also when there is no progress."""
    spike_deviations: Positive | None = 6.0
    """how far a spike is above the median of the last applied steps, in deviations of those steps;
    a loss above 2 ln V + 10 is one from the first step on. null looks for none."""
    rewind_skip_batches: CountOrZero = 100
    """`rewind`: how many batches are left out after the step that was in trouble, beside all that
    were read since the checkpoint."""
    max_rewinds: Count = 3
    """`rewind`: how often to go back without reaching a newer good checkpoint."""
    no_progress_steps: Count | None = 2000
    """warn when the training loss has for so long not been below that of token frequencies alone:
    ln V, or the entropy of single tokens where that is less. null never looks."""
    replay_steps: Count | None = None
    """how often a step is computed twice and the bits are compared, to find devices that compute
    wrongly; needs room for a second state. null never does."""
    replica_steps: Count | None = None
    """how often the copies that devices hold of the same array are compared. null never does."""
    routers: RouterLimits = RouterLimits()
