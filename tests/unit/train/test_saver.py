"""A save that fails is told and made up for; a second failure in a row ends the run."""

import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError
from glamcli.progress import Silent
from glamcli.train.saver import Saver
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
def saver(tmp_path):
    heard = Heard()
    saver = Saver(Checkpoints(tmp_path), heard)
    yield saver, heard.warned, heard.said
    saver.checkpoints.close()


def test_a_failed_save_is_told_and_owed_until_the_next_one(saver):
    saver, warned, saved = saver
    saver.save(1, STATE, {})
    saver.finish(1, STATE, {})
    save_without_room(saver.checkpoints, 2, STATE)
    assert (saver.is_owed, saved) == (False, ["step 1: saved"])
    saver.poll()
    assert saver.is_owed
    (told,) = warned
    assert told.startswith("saving step 2 failed: ")
    assert told.endswith("; trying again (step 1 is complete)")
    assert [path.name for path in saver.checkpoints.folder.iterdir()] == ["1"]
    saver.save(3, STATE, {})
    saver.finish(3, STATE, {})
    assert (saver.is_owed, saved) == (False, ["step 1: saved", "step 3: saved"])
    assert saver.checkpoints.steps() == [3, 1]


def test_the_last_step_is_saved_again_at_once(saver):
    saver, warned, saved = saver
    save_without_room(saver.checkpoints, 9, STATE)
    saver.finish(9, STATE, {})
    assert len(warned) == 1
    assert (saved, saver.checkpoints.steps()) == (["step 9: saved"], [9])


def test_a_second_failure_in_a_row_ends_the_run_and_one_after_success_does_not(saver):
    saver, warned, saved = saver
    save_without_room(saver.checkpoints, 1, STATE)
    saver.poll()
    saver.save(2, STATE, {})
    saver.finish(2, STATE, {})
    save_without_room(saver.checkpoints, 3, STATE)
    saver.poll()
    assert (len(warned), saved) == (2, ["step 2: saved"])
    save_without_room(saver.checkpoints, 4, STATE)
    with pytest.raises(CheckpointError, match="saving step 4 failed") as caught:
        saver.poll()
    assert caught.value.hint == "step 2 is complete"
    assert saver.checkpoints.steps() == [2]
