"""A save that fails is repeated at the next step; a second failure in a row ends the run."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import CheckpointError
from glamcli.progress import Silent
from glamcli.train.events import Save
from unit.full_disk import save_without_room

STATE = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=10_000), jnp.float32)}}


class Heard(Silent):
    def __init__(self):
        self.warned, self.said = [], []

    def warn(self, text):
        self.warned.append(text)

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def run(tmp_path):
    """The event that saves, its checkpoints, and what was heard of both."""
    heard = Heard()
    aside = SimpleNamespace(beat=nothing, flush=nothing, restart_clock=nothing, loss_sums={})
    data = SimpleNamespace(schedule=SimpleNamespace(history=lambda rows: rows), batch_rows=1)
    running = SimpleNamespace(
        recipe=load_recipe("test-tiny", ["train.steps=99"]).recipe,
        run_identity={"data": {}},
        dataset=data,
        meter=aside,
        watchdog=aside,
        progress=heard,
        stacked=lambda state: state,
    )
    checkpoints = Checkpoints(tmp_path)
    yield Save(running, checkpoints), checkpoints, heard
    checkpoints.close()


def nothing(*arguments):
    pass


def test_a_failed_save_is_told_and_owed_until_the_next_one(run):
    save, checkpoints, heard = run
    save.run(1, STATE)
    save.finish(1, STATE)
    save_without_room(checkpoints, 2, STATE)
    assert (save.is_owed, heard.said) == (False, ["step 1: saved"])
    save.poll()
    assert save.is_owed
    (warning,) = heard.warned
    assert warning.startswith("saving step 2 failed: ")
    assert warning.endswith("; trying again (step 1 is complete)")
    assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
    save.run(3, STATE)
    save.finish(3, STATE)
    assert (save.is_owed, heard.said) == (False, ["step 1: saved", "step 3: saved"])
    assert checkpoints.steps() == [3, 1]


def test_the_last_step_is_saved_again_at_once(run):
    save, checkpoints, heard = run
    save_without_room(checkpoints, 9, STATE)
    save.finish(9, STATE)
    assert len(heard.warned) == 1
    assert (heard.said, checkpoints.steps()) == (["step 9: saved"], [9])


def test_a_second_failure_in_a_row_ends_the_run_and_one_after_success_does_not(run):
    save, checkpoints, heard = run
    save_without_room(checkpoints, 1, STATE)
    save.poll()
    save.run(2, STATE)
    save.finish(2, STATE)
    save_without_room(checkpoints, 3, STATE)
    save.poll()
    assert (len(heard.warned), heard.said) == (2, ["step 2: saved"])
    save_without_room(checkpoints, 4, STATE)
    with pytest.raises(CheckpointError, match="saving step 4 failed") as caught:
        save.poll()
    assert caught.value.hint == "step 2 is complete"
    assert checkpoints.steps() == [2]
