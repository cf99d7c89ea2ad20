"""Errors are counted, and a run that fails three times in a row from one step is not started again;
running out of memory is explained."""

import json
import time

import jax
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.config.load import load_recipe
from glamcli.errors import (
    CrashLoop,
    DataError,
    HostError,
    PlanError,
    Preempted,
    SaveFailed,
    TrainError,
)
from glamcli.hosts.join import ALONE, Host
from glamcli.train.ending import FAILURES, ending

RECIPE = load_recipe("test-tiny").recipe
OTHER = load_recipe("test-tiny", ["seed=1"]).recipe


def end(folder, error=None, start=7, recipe=RECIPE, host=ALONE):
    """A run from this step, which ends so."""
    with ending(folder, recipe, start, Checkpoints(folder / "checkpoints"), host):
        if error is not None:
            raise error


def fails(folder, error, **options):
    with pytest.raises(type(error), match=str(error)):
        end(folder, error, **options)


def test_the_fourth_start_after_three_failures_from_one_step_is_refused(tmp_path):
    for error in (ZeroDivisionError("by nothing"), TrainError("a"), TrainError("not finite")):
        fails(tmp_path, error)
    with pytest.raises(CrashLoop) as refused:
        end(tmp_path)
    assert refused.value.exit_code == TrainError.exit_code
    assert refused.value.what == (
        "the last 3 starts from step 7 all failed before another checkpoint: not finite"
    )
    assert refused.value.hint.endswith(f"deleting {tmp_path / FAILURES}, or in an hour")
    (tmp_path / FAILURES).unlink()
    end(tmp_path)


@pytest.mark.parametrize("other", [{"start": 8}, {"recipe": OTHER}])
def test_another_step_or_another_recipe_starts_counting_anew(tmp_path, other):
    for _ in range(3):
        fails(tmp_path, TrainError("not finite"))
    end(tmp_path, **other)
    for _ in range(3):
        fails(tmp_path, TrainError("not finite"), **other)
    with pytest.raises(CrashLoop):
        end(tmp_path, **other)


@pytest.mark.parametrize(
    "end_of_run",
    [Preempted("saved"), HostError("gone"), KeyboardInterrupt("now"), BrokenPipeError("closed")],
)
def test_signals_and_lost_machines_never_count(tmp_path, end_of_run):
    for _ in range(9):
        fails(tmp_path, end_of_run)
    end(tmp_path)
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize(
    "error",
    [SaveFailed("saving failed"), SaveFailed("no room"), OSError("full"), DataError("unreadable")],
)
def test_what_the_system_refuses_never_counts(tmp_path, error):
    error.__cause__ = OSError("full") if isinstance(error, DataError) else None
    for _ in range(4):
        fails(tmp_path, error)
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize("seconds", [3601, -1])
def test_an_hour_later_or_by_another_clock_failures_count_anew(tmp_path, monkeypatch, seconds):
    for _ in range(3):
        fails(tmp_path, DataError("a damaged record"))
    with pytest.raises(CrashLoop):
        end(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    for _ in range(3):
        fails(tmp_path, DataError("a damaged record"))
    with pytest.raises(CrashLoop):
        end(tmp_path)


def test_a_run_that_is_killed_leaves_no_note(tmp_path):
    running = ending(tmp_path, RECIPE, 0, Checkpoints(tmp_path), ALONE)
    running.__enter__()
    assert not (tmp_path / FAILURES).exists()
    del running


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"5", b"\xff", b"[" * 50_000, b'{"failures": 3}', b'{"failures": [[1]]}'),
        b'{"failures": [], "time": 1%s}' % (b"0" * 400),
    ],
)
def test_a_damaged_note_is_no_note(tmp_path, content):
    (tmp_path / FAILURES).write_bytes(content)
    end(tmp_path)
    fails(tmp_path, TrainError("not finite"))
    assert len(json.loads((tmp_path / FAILURES).read_text())["failures"]) == 1


class Left(BaseException):
    """The end of this process, once the news has come that another one is gone."""


def test_what_a_lost_machine_breaks_in_the_first_process_never_counts(tmp_path, monkeypatch):
    def leave(host, error):
        raise Left

    monkeypatch.setattr(Host, "_fail", leave)
    for error in (jax.errors.JaxRuntimeError("Connection closed by peer"), SaveFailed("no step")):
        with pytest.raises(Left):
            end(tmp_path, error, host=Host(0, 2, wire=object()))
    assert not (tmp_path / FAILURES).exists()


def test_the_refusal_is_no_failure(tmp_path):
    for _ in range(3):
        fails(tmp_path, TrainError("not finite"))
    before = (tmp_path / FAILURES).read_text()
    with pytest.raises(CrashLoop):
        end(tmp_path)
    assert (tmp_path / FAILURES).read_text() == before


def test_of_several_processes_the_first_one_counts(tmp_path):
    for _ in range(9):
        fails(tmp_path, TrainError("not finite"), host=Host(1, 2))
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            "out of device memory: Out of memory allocating 9 bytes.",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory x"),
            "out of device memory: INTERNAL: Error dispatching computation: Out of memory x",
        ),
        (MemoryError("Unable to allocate 7 GiB"), "out of memory: Unable to allocate 7 GiB"),
        (MemoryError(), "out of memory"),
    ],
)
def test_running_out_of_memory_says_what_to_change_and_what_is_kept(tmp_path, error, what):
    for number, step in enumerate((None, 20)):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.latest = lambda step=step: step
        with (
            pytest.raises(PlanError) as caught,
            ending(tmp_path, RECIPE, number, checkpoints, ALONE),
        ):
            raise error
        assert caught.value.what == what
        assert caught.value.exit_code == 5
        assert caught.value.hint.startswith("lower `batch.row_tokens`, raise `batch.accumulate`")
        assert caught.value.hint.endswith("goes on from there") == (step is not None)


def test_other_errors_of_xla_stay_what_they_are(tmp_path):
    fails(tmp_path, jax.errors.JaxRuntimeError("INTERNAL: something"))
