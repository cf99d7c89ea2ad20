"""A save that fails is tried again on a clock, until a stated time has passed."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from glamcli import atomic
from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import CheckpointError, SaveFailed
from glamcli.hosts.join import ALONE, Host
from glamcli.progress import Silent
from glamcli.step_folders import ARRAYS_URL
from glamcli.train import save as saving
from glamcli.train.retry import Clock
from glamcli.train.times import Times
from unit.full_disk import save_without_room

STATE = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=10_000), jnp.float32)}}


class Heard(Silent):
    def __init__(self):
        self.warned, self.said = [], []

    def warn(self, text):
        self.warned.append(text)

    def say(self, text):
        self.said.append(text)


class Hand(Clock):
    """A clock that only this test moves, and that waiting moves."""

    def __init__(self):
        self.seconds = 0.0
        super().__init__(lambda: self.seconds, self.pass_)

    def pass_(self, seconds):
        self.seconds += seconds


@pytest.fixture
def run(tmp_path):
    """The event that saves, its checkpoints, what was heard of both, and its clock."""
    heard, clock = Heard(), Hand()
    aside = SimpleNamespace(beat=nothing, flush=nothing, restart_clock=nothing, loss_sums={})
    aside.times, aside.routers = Times(), SimpleNamespace(saved=dict)
    aside.capacity = SimpleNamespace(saved=list)
    aside.health = SimpleNamespace(is_good=True)
    aside.health.saved = lambda step: {"good": aside.health.is_good}
    data = SimpleNamespace(schedule=SimpleNamespace(history=lambda rows: rows), batch_rows=1)
    running = SimpleNamespace(
        recipe=load_recipe("test-tiny", ["train.steps=199", "every.checkpoint_steps=50"]).recipe,
        run_dir=tmp_path,
        run_identity={"data": {}},
        dataset=data,
        meter=aside,
        watchdog=aside,
        progress=heard,
        stacked=lambda state: state,
        host=ALONE,
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    yield saving.Save(running, checkpoints, clock), checkpoints, heard, clock
    checkpoints.close()


def nothing(*arguments):
    pass


def test_a_failed_save_is_told_and_owed_until_the_next_one(run):
    save, checkpoints, heard, clock = run
    save.run(1, STATE)
    save.finish(1, STATE)
    clock.pass_(90)
    save_without_room(checkpoints, 2, STATE)
    assert (save.is_owed, heard.said) == (False, ["step 1: saved"])
    save.poll()
    assert save.is_owed
    (warning,) = heard.warned
    assert warning.startswith("saving step 2 failed: ")
    assert warning.endswith(
        " (step 1 is complete; 1:30 of training not saved); trying again in 5.0 s, for 30:00 at"
        f" most: make room in {checkpoints.folder}"
    )
    assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
    assert not save.is_due(3)
    clock.pass_(5)
    assert save.is_due(3)
    save.run(3, STATE)
    assert not save.is_due(4)
    save.finish(3, STATE)
    assert (save.is_owed, heard.said) == (False, ["step 1: saved", "step 3: saved"])
    assert checkpoints.steps() == [3, 1]


def test_attempts_come_after_seconds_then_minutes_until_the_stated_time_has_passed(run):
    save, checkpoints, heard, clock = run
    waits = [5, 15, 60, *[120] * 14, 40]
    error = SaveFailed("saving step 7 failed: no room", hint="step 5 is complete")

    def fail():
        raise error

    checkpoints.poll = fail
    for wait in waits:
        save.poll()
        clock.pass_(wait - 1)
        assert not save.is_due(7)
        clock.pass_(1)
        assert save.is_due(7)
    assert clock.seconds == 1800
    with pytest.raises(SaveFailed, match="saving step 7 failed") as ended:
        save.poll()
    assert len(heard.warned) == len(waits)
    assert ended.value.hint == (
        "step 5 is complete; 30:00 of training not saved, tried for 30:00 "
        "(`checkpoints.retry_seconds`)"
    )


@pytest.mark.parametrize(("limit", "attempts"), [(0, 1), (60, 4), (1800, 5)])
def test_a_long_evaluation_does_not_take_the_place_of_attempts(run, limit, attempts):
    save, checkpoints, heard, clock = run
    save._retry.limit = limit
    for number in range(attempts):
        assert len(heard.warned) == number
        save_without_room(checkpoints, 7, STATE)
        if number < attempts - 1:
            save.poll()
            clock.pass_(1860)
            assert save.is_due(8)
    with pytest.raises(SaveFailed):
        save.poll()


def test_regular_saves_and_the_end_do_not_wait_for_the_clock(run):
    save, checkpoints, _, _ = run
    save_without_room(checkpoints, 7, STATE)
    save.poll()
    due = {step: save.is_due(step) for step in (8, 50, 199)}
    assert due == {8: False, 50: True, 199: True}
    assert save.is_due(8, stopping=True)


def test_after_a_success_the_time_starts_again(run):
    save, checkpoints, heard, clock = run
    for step in (1, 3):
        save_without_room(checkpoints, step, STATE)
        save.poll()
        clock.pass_(1799)
        save.run(step + 1, STATE)
        save.finish(step + 1, STATE)
    assert (len(heard.warned), heard.said) == (2, ["step 2: saved", "step 4: saved"])


def test_at_the_end_it_waits_and_tries_again(run):
    save, checkpoints, heard, clock = run
    save_without_room(checkpoints, 9, STATE)
    save.finish(9, STATE)
    assert len(heard.warned) == 1
    assert (heard.said, checkpoints.steps()) == (["step 9: saved"], [9])
    assert clock.seconds == 5


def test_a_slow_save_is_told_and_again_when_its_time_has_doubled(run, monkeypatch):
    save, checkpoints, heard, clock = run
    save.run(1, STATE)
    poll = checkpoints.poll
    monkeypatch.setattr(checkpoints, "poll", lambda: None)
    for _ in range(300):
        clock.pass_(1)
        save.poll()
    assert heard.warned == [
        f"a save has taken {time} so far; {time} of training not saved"
        for time in ("1:00", "2:00", "4:00")
    ]
    monkeypatch.setattr(checkpoints, "poll", poll)
    checkpoints._open().wait_until_finished()
    save.poll()
    assert (heard.said, len(heard.warned)) == (["step 1: saved"], 3)


def test_a_run_folder_that_is_deleted_ends_the_run_within_a_second_and_at_a_save(
    run, tmp_path, monkeypatch
):
    save, _, _, clock = run
    looks = []
    is_gone = saving._is_gone
    monkeypatch.setattr(saving, "_is_gone", lambda path: looks.append(path) or is_gone(path))
    save.poll()
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    for _ in range(100):
        save.poll()
        clock.pass_(0.009)
    assert len(looks) == 1
    with pytest.raises(CheckpointError, match=f"the run folder {tmp_path} is gone"):
        save.run(1, STATE)
    assert not tmp_path.exists()
    clock.pass_(1)
    with pytest.raises(CheckpointError, match=f"the run folder {tmp_path} is gone"):
        save.poll()
    tmp_path.with_name("elsewhere").rename(tmp_path)
    clock.pass_(1)
    save.poll()


def test_one_of_several_processes_does_not_try_again(run):
    save, checkpoints, _, _ = run
    save_without_room(checkpoints, 1, STATE)
    checkpoints.host = Host(0, 2)
    with pytest.raises(SaveFailed):
        save.poll()
    checkpoints.host = ALONE


def test_weights_of_a_bad_streak_are_saved_only_when_the_run_ends_or_stops(run):
    save, checkpoints, _, _ = run
    health = save._running.meter.health
    health.is_good = False
    assert not save.is_due(49)
    assert save.is_due(50)
    save.run(50, STATE)
    checkpoints.wait()
    assert checkpoints.steps() == []
    assert save.is_due(51), "what was due is owed"
    health.is_good = True
    save.run(51, STATE)
    assert not save.is_due(52)
    health.is_good = False
    assert save.is_due(53, stopping=True)
    save.run(53, STATE)
    checkpoints.wait()
    assert [checkpoints.meta(step)["good"] for step in (53, 51)] == [False, True]
    assert not save.is_due(54)


class Writer:
    """What writes steps to a bucket; this test says when a step is there."""

    def __init__(self, folder):
        self.folder, self.step = folder, None

    def save(self, step, args):
        self.step, self.args = step, args
        return True

    def is_saving_in_progress(self):
        return self.step is not None

    def arrive(self):
        meta = self.folder / str(self.step) / "meta" / "metadata"
        atomic.write(meta, json.dumps(self.args["meta"].item))
        atomic.write(meta.parents[1] / ARRAYS_URL, "gs://bucket/run/arrays/1/1-1")
        self.step = None

    def wait_until_finished(self):
        pass

    close = wait_until_finished


def test_training_does_not_wait_for_a_bucket_and_owes_what_is_due_meanwhile(run, monkeypatch):
    save, checkpoints, heard, _ = run
    checkpoints.in_bucket, writer = object(), Writer(checkpoints.folder)
    monkeypatch.setattr(checkpoints, "_writer", lambda: writer)
    assert save.is_due(50)
    save.run(50, STATE)
    save.poll()
    assert not save.is_due(51)
    assert not save.is_due(100), "it would wait for the save of step 50"
    assert save.is_owed
    save.poll()
    assert not save.is_due(101)
    writer.arrive()
    save.poll()
    assert save.is_due(102)
    save.run(102, STATE)
    assert not save.is_owed
    assert save.is_due(103, stopping=True), "a run that stops saves where it stops"
    writer.arrive()
    save.poll()
    assert heard.said == ["step 50: saved", "step 102: saved"]
    assert not heard.warned
    assert not save.is_due(103)
