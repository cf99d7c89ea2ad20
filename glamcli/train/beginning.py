"""How a run begins: anew, or from the newest checkpoint that proves to be whole.

Which step that is, is known when its arrays are read and verified; so what depends on the step
(batches, metrics) is opened after this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Recipe
from glamcli.data.open import Dataset
from glamcli.hosts.join import Host
from glamcli.hosts.watchdog import LONG, Watchdog, make_watchdog
from glamcli.memory import explaining_memory
from glamcli.model.decoder import Decoder
from glamcli.model.params import unstack_blocks
from glamcli.progress import Progress
from glamcli.step_folders import Meta, describing, newest_first
from glamcli.stored_arrays import newest_usable
from glamcli.train import identity
from glamcli.train.folder import (
    after_rewinds,
    check_resumption,
    refuse_other_recipe,
    write_run_files,
)
from glamcli.train.heldout import warn_of_unscored
from glamcli.train.rewind import RECORDS, not_skipped, rewind_command
from glamcli.train.state import State, abstract_state, init_state

STATE_HINT = (
    "only weights and optimizer state are in memory by now, so the batch and `train.remat` change "
    "nothing: free memory that other programs hold, or spread them over more devices (`mesh: auto`,"
    " or a larger `mesh.data`, `mesh.expert` or `mesh.model`)"
)


class First(NamedTuple):
    """What the first step of a process needs: batches consumed so far, the step that was restored
    (0 for none) with its description, the run's identity, and the state."""

    start: int
    saved_step: int
    saved: Mapping[str, Any]
    run_identity: dict[str, Any]
    state: State


@dataclass(frozen=True)
class Beginning:
    """What is open by then."""

    recipe: Recipe
    run_dir: Path
    dataset: Dataset
    mesh: Mesh
    decoder: Decoder
    checkpoints: Checkpoints
    progress: Progress
    host: Host
    origins: Mapping[str, str]

    def first(self, is_new: bool, strict: bool) -> First:
        """What a run starts with that is new, or else continues from the newest checkpoint that can
        be used. The files beside the checkpoints are written.

        Raises: CheckpointError when that is another run's, or there is none; with `strict` when the
            newest is damaged; when the folder cannot be written. PlanError: out of memory.
        """
        warn_of_unscored(self.dataset, self.recipe.train.steps, self.progress)
        watching = make_watchdog(self.recipe.runtime, self.host)
        with explaining_memory(lambda: STATE_HINT), watching as watchdog:
            first = self._anew(watchdog) if is_new else self._continued(watchdog, strict)
        if self.host.is_first:
            about = {**first.run_identity, "origins": {**self.origins}}
            write_run_files(self.run_dir, self.recipe, about, self.dataset.tokenizer)
        return first

    def _anew(self, watchdog: Watchdog) -> First:
        watchdog.beat("initialising", LONG)
        with self.progress.phase("initialising"):
            optimizer, seed = self.recipe.optimizer, self.recipe.seed
            # Awaited: without memory for it, it fails here.
            state = jax.block_until_ready(init_state(self.decoder, optimizer, seed, self.mesh))
        run_identity = identity.identity(self.recipe, self.dataset, self.mesh)
        return First(0, 0, {}, {**run_identity, "skipped_batches": []}, state)

    def _continued(self, watchdog: Watchdog, strict: bool) -> First:
        first = newest_usable(
            lambda: newest_first(self.checkpoints.folder),
            lambda folder, saved: self._restored(folder, saved, watchdog),
            self.host,
            self.progress.warn,
            strict,
            self.checkpoints.reject,
        )
        self.progress.say(f"continuing from step {first.saved_step}")
        if first.start > first.saved_step:
            batches = f"{first.saved_step + 1} to {first.start}"
            self.progress.say(f"skipping batches {batches}, as recorded in {RECORDS}")
        if self.host.is_first and (rewound := not_skipped(self.run_dir, first.saved_step)):
            to, end = rewound.to_step, rewound.to_step + rewound.skip_batches
            back = rewind_command(self.run_dir, first.saved_step, end - first.saved_step)
            self.progress.warn(
                f"step {to} cannot be used, so batches {to + 1} to {end} are not left out; to leave"
                f" them out, stop the run and use {back}"
            )
        return first

    def _restored(self, folder: Path, saved: Meta, watchdog: Watchdog) -> First:
        """The state in a step folder that is described by `saved`, laid out for this mesh. Batches
        that the records of rewinds leave out count as consumed."""
        step, last = int(folder.name), self.recipe.train.steps
        refuse_other_recipe(self.run_dir, step, saved, self.recipe)
        with describing(folder):
            start, skipped = after_rewinds(self.run_dir, step, saved, last, self.host)
            run_identity = identity.identity(self.recipe, self.dataset, self.mesh) | skipped
            check_resumption(self.run_dir, step, saved, run_identity, self.dataset, self.progress)
        watchdog.beat(f"restoring step {step}", LONG)
        with self.progress.phase("restoring"):
            decoder = replace(self.decoder, apart=False)
            target = abstract_state(decoder, self.recipe.optimizer, self.mesh)
            state = self.checkpoints.restore(step, target, self.progress.warn, saved)
            if self.decoder.apart:
                state = jax.jit(unstack_blocks, static_argnums=1)(state, decoder.num_blocks)
        if start > step:
            skip = jax.jit(
                lambda at: (at + (start - step), at * 0), out_shardings=state.step.sharding
            )
            consumed, none = skip(state.step)
            state = state._replace(step=consumed, bad_steps=none)
        return First(start, step, saved, run_identity, state)
