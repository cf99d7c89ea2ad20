"""A run seen from outside: whether it lives, and the newest of its numbers."""

import json
import os
import time

import pytest

from glamcli.config.dump import dump
from glamcli.config.load import load_recipe
from glamcli.hosts.lock import NAME, holder, locked
from glamcli.train import metric_files
from glamcli.train.ending import FAILURES
from glamcli.train.metric_files import MetricsTail
from glamcli.train.watching import WatchedRun


@pytest.fixture
def run(tmp_path):
    """A run of 8 steps, of which the metrics have 5."""
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe("test-tiny", ["train.steps=8"]).recipe))
    write(tmp_path, *({"step": step, "loss": 9.0 - step} for step in range(1, 6)))
    return tmp_path


def write(folder, *lines, unix_seconds=1e9, mode="a"):
    with (folder / "metrics.jsonl").open(mode) as file:
        for line in lines:
            file.write(json.dumps({"unix_seconds": unix_seconds, **line}) + "\n")


def save(folder, step):
    for item in ("state/_METADATA", "meta/metadata"):
        path = folder / f"checkpoints/{step}/{item}"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"step": step, "format": 3, "tree": {}}))


def seen(folder):
    watched = WatchedRun(folder)
    watched.refresh()
    return watched


def test_a_run_is_alive_while_a_process_holds_it(run):
    assert (seen(run).state, holder(run)) == ("stopped", None)
    with locked(run):
        assert seen(run).state == "starting"
        assert seen(run).holder == holder(run) == f"process {os.getpid()} on {os.uname().nodename}"
        write(run, {"step": 6}, unix_seconds=time.time() + 1)
        assert seen(run).state == "training"
    assert seen(run).state == "stopped"
    with locked(run):  # to look at it took nothing away
        write(run, {"step": 8})
        save(run, 8)
    assert seen(run).state == "finished"


def test_a_run_is_finished_when_its_last_step_is_saved(run):
    write(run, {"step": 8})
    save(run, 4)
    assert seen(run).state == "stopped"
    save(run, 8)
    assert seen(run).state == "finished"
    (run / FAILURES).write_text(json.dumps({"time": 2e9, "failures": [["out of memory", 5]]}))
    assert seen(run).state == "failed"


def test_what_is_left_of_a_killed_process_holds_nothing(run):
    for text in ("process 4194305 on " + os.uname().nodename, "process 1 on elsewhere", "", "\0x"):
        (run / NAME).write_text(text)
        assert holder(run) is None
        assert seen(run).state == "stopped"


def test_a_run_died_of_its_failure_unless_it_went_on_since(run):
    def fail(at):
        noted = {"time": at, "failures": [["old", 1], ["loss not finite", 6]]}
        (run / FAILURES).write_text(json.dumps(noted))
        watched = seen(run)
        assert watched.failure is not None
        return watched.state, watched.failure[1]

    assert fail(2e9) == ("failed", "loss not finite (exit 6)")
    assert fail(5e8) == ("stopped", "loss not finite (exit 6)")
    for damage in (
        "",
        "[]",
        '{"time": 2e9, "failures": []}',
        '{"time": "x", "failures": [["a", 1]]}',
    ):
        (run / FAILURES).write_text(damage)
        assert seen(run).state == "stopped"


def test_a_folder_that_comes_and_goes_is_no_error(tmp_path):
    watched, folder = WatchedRun(tmp_path / "run"), tmp_path / "run"
    states = []
    for change in (
        lambda: None,
        folder.mkdir,
        lambda: write(folder, {"step": 3}),
        lambda: folder.rename(tmp_path / "gone"),
        lambda: (tmp_path / "gone").rename(folder),
    ):
        change()
        watched.refresh()
        states.append((watched.state, watched.numbers.step))
    assert states == [("absent", 0), ("empty", 0), ("stopped", 3), ("absent", 0), ("stopped", 3)]


def test_a_run_that_died_before_its_first_step_is_one_that_stopped(tmp_path):
    (tmp_path / "recipe.yaml").write_text("extends: test-tiny\n")
    assert seen(tmp_path).state == "empty"
    (tmp_path / "run.json").write_text("{}")
    assert seen(tmp_path).state == "stopped"


def test_numbers_are_the_newest_and_those_of_before_a_return_are_forgotten(run):
    watched = seen(run)
    write(run, {"step": 5, "heldout/web": 4.5})
    write(run, {"step": 3, "loss": 1.5, "grad_norm": float("nan")}, {"step": 4, "rate": True})
    watched.refresh()
    numbers = watched.numbers
    assert [*numbers.losses] == [(1, 8.0), (2, 7.0), (3, 1.5)]
    assert (numbers.step, numbers.value("loss"), numbers.value("heldout/web")) == (4, 1.5, None)
    assert (numbers.value("grad_norm"), numbers.value("rate")) == (None, None)
    write(run, {"step": 5, "loss": None})
    watched.refresh()
    assert numbers.value("loss") is None
    write(run, {"step": 6, "loss": 2.5})
    watched.refresh()
    assert numbers.value("loss") == 2.5


def test_skipped_updates_and_alarms_are_events(run):
    write(
        run,
        {"step": 6, "bad_steps": 1, "spike": 1},
        {"step": 7, "bad_steps": 2, "spike": 0},
        {"step": 7, "alarms": ["expert layer 1: ..."]},
        {"step": 8, "alarms": 5},
    )
    assert [*seen(run).numbers.events] == [
        (6, "update skipped: a spike"),
        (7, "update skipped: not finite"),
        (7, "expert layer 1: ..."),
    ]


def steps_of(lines):
    return [line["step"] for line in lines]


def test_a_line_is_taken_once_and_when_it_is_whole(run):
    tail, path = MetricsTail(run / "metrics.jsonl"), run / "metrics.jsonl"
    assert steps_of(tail.new_lines()[1]) == [1, 2, 3, 4, 5]
    with path.open("a") as file:
        file.write('{"step": 6')
        file.flush()
        assert tail.new_lines() == (False, [])
        file.write("}\nnonsense\n")
    assert tail.new_lines() == (False, [{"step": 6}])
    assert tail.new_lines() == (False, [])
    write(run, {"step": 2}, mode="w")
    is_other, lines = tail.new_lines()
    assert (is_other, steps_of(lines)) == (True, [2])
    path.unlink()
    assert [tail.new_lines(), tail.new_lines()] == [(True, []), (False, [])]


def test_a_file_that_was_cut_and_has_grown_again_is_another_one(run):
    tail = MetricsTail(run / "metrics.jsonl")
    tail.new_lines()
    write(run, *({"step": step, "loss": 1.0} for step in range(1, 9)), mode="r+")
    is_other, lines = tail.new_lines()
    assert (is_other, steps_of(lines)) == (True, [*range(1, 9)])


def test_of_a_long_file_only_the_end_is_read(run, monkeypatch):
    monkeypatch.setattr(metric_files, "TAIL_BYTES", 140)
    lines = steps_of(MetricsTail(run / "metrics.jsonl").new_lines()[1])
    assert lines == [4, 5], "what is left of the line before is no line"
