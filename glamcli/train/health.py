"""What a run does about steps whose numbers look wrong: tells, waits, and ends when it must.

Which steps those are was decided on the devices (`guard.py`); their updates were not applied. The
numbers are the same in every process, so all of them come to the same conclusion at the same step.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.errors import CheckpointError, TrainError
from glamcli.progress import Progress
from glamcli.train.go_back import GoBack, plan
from glamcli.train.guard import explosion
from glamcli.train.metrics import LossSums
from glamcli.train.rewind import rewind_command

_QUANTITIES = ("loss", "gradient norm", "update norm")


class Health:
    """Whether a run is in good health; `saved` is the metadata of the checkpoint it continues."""

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        checkpoints: Checkpoints,
        saved: Mapping[str, Any],
        start: int,
    ):
        """`start` is how many batches were consumed."""
        self._recipe, self._progress, self._checkpoints = recipe, progress, checkpoints
        self.is_good: bool = saved.get("good", True)
        """whether the update of the newest step that was read was applied. Nothing else is known of
        the weights after it: they are proven by the next step that is applied."""
        self.spikes_total: int = saved.get("spikes_total", 0)
        self.unigram_nats: Mapping[str, float] = {}
        """entropy of the single tokens of every source as far as known, nats per token."""
        # Batches that were left out after `saved` are no steps without progress.
        self._progressed = start - saved.get("steps_without_progress", 0)
        self._warned = self._progressed

    def saved(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` carries."""
        without = step - self._progressed
        counted = {"steps_without_progress": without, "spikes_total": self.spikes_total}
        return {"good": self.is_good, **counted}

    def notice(self, step: int, sums: Mapping[str, Any]) -> None:
        """Counts a step, and warns of one whose update was skipped."""
        self.spikes_total += int(sums["spike"])
        self.is_good = not sums["bad_steps"]
        if not self.is_good:
            why = _why(self._recipe, sums)
            self._progress.warn(f"step {step}: {why}; update skipped, weights stay as they were")

    def check(self, step: int, sums: Mapping[str, Any]) -> None:
        """
        Raises:
            TrainError: too many updates in a row were skipped, or a spike is to end the run.
            GoBack: `guard.on_spike` is `rewind`, and there is a good step to go back to.
        """
        bad_steps = int(sums["bad_steps"])
        if bad_steps >= self._recipe.train.max_bad_steps:
            why = _why(self._recipe, sums)
            steps = f"{bad_steps} steps in a row were" if bad_steps > 1 else "a step was"
            what = f"{steps} skipped, up to step {step}: {why}"
            raise self._end(what, step, step - bad_steps)
        if sums["spike"] and self._recipe.guard.on_spike == "stop":
            why = _why(self._recipe, sums)
            raise self._end(f"step {step}: {why}", step, step - bad_steps)

    def check_progress(self, step: int, losses: Mapping[str, LossSums]) -> None:
        """Compares the losses of the last steps, by source and of all (`""`), with what the
        frequencies of tokens alone would cost.

        Raises: TrainError when that is no better for too long and `guard.on_spike` is `stop`.
        """
        blind = math.log(self._recipe.model.vocab_size)
        nats, num_targets = losses[""]
        cost = sum(
            min(blind, self.unigram_nats.get(name, blind)) * count
            for name, (_, count) in losses.items()
            if name
        )
        if nats < cost or not num_targets:
            self._progressed = self._warned = step
        limit, since = self._recipe.guard.no_progress_steps, step - self._progressed
        if limit is None or step - self._warned < limit:
            return
        self._warned = step
        what = (
            f"no progress for {since:,} steps: at step {step} the loss is "
            f"{nats / num_targets:.4g}, and the frequencies of tokens alone give "
            f"{cost / num_targets:.4g}"
        )
        if self._recipe.guard.on_spike == "stop":
            raise self._end(what, step, self._progressed)
        self._progress.warn(what)

    def _end(self, what: str, step: int, last_applied: int) -> TrainError | GoBack:
        """What ends this attempt at `step`."""
        good = self._last_good(last_applied)
        lower = "start anew (`--fresh`) with a lower `optimizer.learning_rate`"
        if good is None:
            return TrainError(what, hint=f"there is no good checkpoint to go back to; {lower}")
        if self._recipe.guard.on_spike == "rewind":
            skip = plan(self._recipe, self._checkpoints, good, step)
            if isinstance(skip, int):
                return GoBack(what, good, skip)
            what = f"{what}; {skip}"
        skip = step - good + self._recipe.guard.rewind_skip_batches
        back = rewind_command(self._checkpoints.folder.parent, good, skip)
        return TrainError(what, hint=f"last good checkpoint: step {good}; {back}, or {lower}")

    def _last_good(self, last_applied: int) -> int | None:
        """The newest step with good weights. Those after the last update that was applied are the
        ones that do not work now: that update may be what spoilt them."""
        with suppress(CheckpointError):  # a save in progress may be the newest
            self._checkpoints.wait()
        good, host = None, self._checkpoints.host
        if host.is_first:
            steps = self._checkpoints.good_steps()
            good = next((step for step in steps if step < last_applied), None)
        return host.gather("good step", good)[0]  # others may see a folder later or no longer


def _why(recipe: Recipe, sums: Mapping[str, Any]) -> str:
    """What is wrong with a step, with its numbers beside those that are usual."""
    if not sums["spike"]:
        norm = float(sums["grad_norm"])
        return f"{'the update is' if math.isfinite(norm) else 'gradients are'} not finite"
    loss = float(sums["loss_nats"]) / max(int(sums["num_targets"]), 1)
    values = (loss, float(sums["grad_norm"]), float(sums["update_norm"]))
    if math.isnan(sums["deviations"][0]):
        return f"loss {loss:,.5g}, above the {explosion(recipe):.4g} that no guess costs"
    each = zip(_QUANTITIES, values, sums["typical"], sums["deviations"], strict=True)
    return "a spike: " + ", ".join(
        f"{name} {value:,.4g} (usually {typical:,.4g}, {deviation:+.1f} deviations)"
        for name, value, typical, deviation in each
    )
