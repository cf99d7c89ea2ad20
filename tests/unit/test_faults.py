"""The injector: nothing without being asked, and every kind does what it says."""

import errno
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli import faults
from glamcli.checkpoint import Checkpoints
from glamcli.config import schema
from glamcli.data.mixture import Schedule
from glamcli.data.rows import TOKEN_FIELDS
from glamcli.data.stream import BatchReader
from glamcli.errors import CheckpointError, DataError, RecipeError
from glamcli.faults import Fault
from glamcli.parallel.mesh import make_mesh
from glamcli.train import programs
from unit.train.test_step import ROWS, first_state, padded_batch, program, recipe


@pytest.fixture(autouse=True)
def disarmed():
    yield
    faults.arm([])


def arm(text, process=0):
    faults.arm(faults.requested(text, allowed=True), process)


def test_a_value_is_a_list_of_kinds_steps_and_processes():
    assert faults.requested("", allowed=False) == []
    assert faults.requested(" kill@3, eio@12+ ,spike@7+:2", allowed=True) == [
        Fault("kill", 3),
        Fault("eio", 12, lasts=True),
        Fault("spike", 7, lasts=True, process=2),
    ]


@pytest.mark.parametrize(
    "text",
    ["kill", "kill@", "kill@0", "kill@-1", "kill@x", "explode@3", "kill@3:", "kill@3,,", "@3"],
)
def test_a_malformed_value_is_refused_with_the_kinds(text):
    with pytest.raises(RecipeError, match="is not kind@step") as caught:
        faults.requested(text, allowed=True)
    assert all(kind in str(caught.value.hint) for kind in faults.FAULT_KINDS)


def test_faults_that_are_not_allowed_are_refused():
    with pytest.raises(RecipeError, match="GLAM_FAULT is set") as caught:
        faults.requested("kill@3", allowed=False)
    assert "--allow-faults" in str(caught.value.hint)


def test_a_fault_is_due_once_at_its_step_in_its_process_unless_it_lasts():
    arm("eio@4,flip@5+,spike@1:1")
    assert [faults.due("eio", step) for step in (3, 4, 4, 5)] == [False, True, False, False]
    assert [faults.due("flip", step) for step in (4, 5, 5, 9)] == [False, True, True, True]
    assert not faults.due("spike", 1)
    arm("spike@1:1", process=1)
    assert faults.due("spike", 1)


@pytest.mark.parametrize(("kind", "number"), [("term", signal.SIGTERM), ("hup", signal.SIGHUP)])
def test_a_signal_is_sent_at_the_start_of_its_step(kind, number):
    got = []
    before = signal.signal(number, lambda signum, frame: got.append(signum))
    try:
        arm(f"{kind}@2")
        faults.start_step(1)
        assert got == []
        faults.start_step(2)
        assert got == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("kind", "name"), [("kill", "SIGKILL"), ("stop", "SIGSTOP")])
def test_signals_that_nobody_can_catch_go_to_this_process(monkeypatch, kind, name):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    arm(f"{kind}@2")
    faults.start_step(2)
    assert sent == [(os.getpid(), getattr(signal, name))]


def test_a_stalled_step_never_starts(monkeypatch):
    class Slept(Exception):
        pass

    def sleep(seconds):
        raise Slept

    monkeypatch.setattr(time, "sleep", sleep)
    arm("stall@2")
    faults.start_step(1)
    with pytest.raises(Slept):
        faults.start_step(2)


def test_the_loss_is_scaled_at_its_step_and_only_in_its_process():
    assert faults.loss_factors(1, 4) == {}
    arm("nan_grad@2,spike@3:1")
    factors = [faults.loss_factors(step, 4)[faults.LOSS_FACTOR] for step in (1, 2, 3)]
    np.testing.assert_array_equal(factors, [[1] * 4, [np.nan] * 4, [1] * 4])
    arm("spike@3:1")  # process 0 runs the program of process 1
    assert faults.scales_loss()


def test_a_row_that_cannot_be_read_is_an_error_of_the_data():
    row = dict.fromkeys(TOKEN_FIELDS, np.ones(4, np.int32))
    schedule = Schedule(0, [(0, {"web": 1})], {"web": 9})
    reader = BatchReader(schedule, {"web": [row] * 9}, 2, 100, start_step=5)
    arm("bad_record@7")
    assert reader[0].keys() == reader[2].keys()
    with pytest.raises(DataError, match=r"of source `web` cannot be read: .*damaged on purpose"):
        _ = reader[1]


def state(step):
    return {"w": jnp.full((64, 256), step, jnp.float32)}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_a_save_fails_in_the_background_with_the_error_of_the_disk(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    checkpoints.wait()
    arm(f"{kind}@2")
    checkpoints.save(2, state(2), {})
    with pytest.raises(CheckpointError, match=os.strerror(getattr(errno, kind.upper()))):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [3, 1]


def test_a_slow_save_goes_on_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_SLOW_SAVE_SECONDS", 0.5)
    checkpoints = Checkpoints(tmp_path)
    arm("slow_save@1")
    checkpoints.save(1, state(1), {})
    assert checkpoints.poll() is None
    assert checkpoints.wait() == 1
    checkpoints.close()


def test_a_process_is_killed_while_it_saves(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    checkpoints = Checkpoints(tmp_path)
    arm("kill_save@1")
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    assert sent == [(os.getpid(), signal.SIGKILL)]


def test_one_bit_of_the_arrays_of_a_finished_step_is_flipped(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    before = files(tmp_path / "1")
    faults.saved(tmp_path / "1", 1)
    assert files(tmp_path / "1") == before
    arm("flip@1")
    faults.saved(tmp_path / "1", 1)
    after = files(tmp_path / "1")
    (changed,) = [path for path in before if after[path] != before[path]]
    assert "state" in changed.parts
    pairs = zip(before[changed], after[changed], strict=True)
    assert sum((old ^ new).bit_count() for old, new in pairs) == 1


def test_the_bit_is_flipped_when_the_step_is_complete(tmp_path, monkeypatch):
    struck = []
    monkeypatch.setattr(faults, "saved", lambda folder, step: struck.append((folder.name, step)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state(7), {})
    assert checkpoints.wait() == 7
    assert struck == [("7", 7)]
    checkpoints.close()


def test_a_step_has_another_program_only_while_a_fault_of_the_loss_is_armed():
    mesh = make_mesh(schema.Mesh(), jax.devices()[:1])
    plain = programs.abstract_batch(recipe(), mesh, ROWS)
    assert programs.training_batch(recipe(), mesh) == plain
    arm("kill@9,spike@2:1")
    assert programs.training_batch(recipe(), mesh).keys() - plain.keys() == {faults.LOSS_FACTOR}


@pytest.mark.slow
def test_a_spike_is_of_the_loss_and_of_the_gradient_and_other_steps_keep_their_bits():
    step, state = program(asked := recipe(accumulate=2))
    batch = padded_batch()
    _, plain = step(state, batch)
    arm("spike@2")
    _, before = step(state, batch | faults.loss_factors(1, ROWS))
    _, spiked = step(first_state(asked.optimizer), batch | faults.loss_factors(2, ROWS))
    for name in ("loss_nats", "grad_norm"):
        assert float(before[name]) == float(plain[name])
        assert float(spiked[name]) > 300 * float(plain[name])
