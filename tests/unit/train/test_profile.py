"""A profile has the steps asked for, once, whatever else happens, and never costs one."""

import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from glamcli import libtpu
from glamcli.config.load import load_recipe
from glamcli.hosts.join import ALONE, Host
from glamcli.progress import Silent
from glamcli.train.profile import Profiled


class Told(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


@jax.jit
def double(x):
    with jax.named_scope("doubling"):
        return 2 * jnp.cos(x)


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    """Traces that hold nothing: in a process that has loaded a libtpu which does not fit, as other
    tests do, JAX's own would end it."""
    folders = []

    def stop():
        session = folders[-1] / "plugins/profile/now"
        session.mkdir(parents=True)
        for name in ("host.xplane.pb", "host.trace.json.gz"):
            (session / name).write_bytes(b"")

    monkeypatch.setattr(libtpu, "unfit", lambda: None)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: folders.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)


def running(tmp_path: Path, steps: str, host: Host = ALONE) -> Any:
    recipe = load_recipe("test-tiny", [f"every.profile_steps={steps}", "train.steps=9"]).recipe
    meter = SimpleNamespace(flush=lambda: None, restart_clock=lambda: None)
    watchdog = SimpleNamespace(beat=lambda *args: None)
    return SimpleNamespace(
        recipe=recipe, run_dir=tmp_path, host=host, meter=meter, watchdog=watchdog, progress=Told()
    )


def train(run: Any, start: int = 0, stop: int = 9) -> Any:
    """Steps start + 1 to `stop`, where the run is asked to stop."""
    x = jnp.ones(4)
    with Profiled(lambda step, state, batch: double(state), run, start, run.run_dir) as step:
        for number in range(start + 1, stop + 1):
            x = step(number, x, None)
            if step.is_due(number, stopping=number == stop):
                assert not step.run(number, x)
    return x


def sessions(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "profile/plugins/profile").glob("*"))


REAL = """
import sys
from pathlib import Path
from unit.train.test_profile import running, train
run = running(Path(sys.argv[1]), "3:5")
train(run)
print(run.progress.said[0])
"""


def test_the_steps_asked_for_and_no_others_are_traced(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sessions(tmp_path) == ["3-5"]
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    with warnings.catch_warnings(action="ignore"):  # of jax 0.12: as errors they abort its reader
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        assert [dict(e.stats)["step_num"] for e in events if e.name == "train"] == [3, 4, 5]
    assert b"doubling" in trace.read_bytes()
    assert str(trace.parent) in said
    assert [path.suffixes for path in (tmp_path / "profile").rglob("*.gz")] == [
        [".trace", ".json", ".gz"]
    ]


def test_without_a_profile_the_steps_are_the_same(tmp_path):
    traced, plain = train(running(tmp_path, "3:5")), train(running(tmp_path / "plain", "null"))
    assert traced.tobytes() == plain.tobytes()
    assert sessions(tmp_path / "plain") == []


@pytest.mark.parametrize(
    ("steps", "start", "stop", "expected"),
    [
        ("3:5", 0, 4, ["3-4"]),  # asked to stop
        ("3:5", 4, 9, ["5-5"]),  # resumed
        ("3:5", 5, 9, []),
        ("8:12", 0, 9, ["8-9"]),  # the run ends before
        ("10:12", 0, 9, []),
    ],
)
def test_of_steps_passed_or_not_reached_there_is_no_profile(tmp_path, steps, start, stop, expected):
    run = running(tmp_path, steps)
    train(run, start, stop)
    assert sessions(tmp_path) == expected
    assert len(run.progress.said) == 1
    assert not run.progress.warned


def test_a_run_that_fails_leaves_the_steps_so_far(tmp_path):
    run = running(tmp_path, "1:9")
    with suppress(KeyError), Profiled(lambda *args: args[1], run, 0, run.run_dir) as step:
        step(1, jnp.ones(1), None)
        raise KeyError
    assert sessions(tmp_path) == ["1-1"]


def test_processes_of_one_host_write_files_of_their_own(tmp_path):
    for index in range(2):
        train(running(tmp_path, "2:3", Host(index, 2)))
    names = {path.name.split("-")[0] for path in (tmp_path / "profile").rglob("*.pb")}
    assert names == {"process0", "process1"}


def test_a_profile_that_cannot_be_written_costs_a_warning_and_no_step(tmp_path, monkeypatch):
    (tmp_path / "profile").write_text("in the way")
    run = running(tmp_path, "2:3")
    train(run)
    assert "training goes on" in run.progress.warned[0]

    def fail(*args, **options):
        raise RuntimeError("the profiler is busy")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    run = running(tmp_path / "other", "2:3")
    train(run)
    assert run.progress.warned == ["no profile: the profiler is busy; training goes on"]


def test_a_profiler_that_writes_nothing_is_told_of(tmp_path, monkeypatch):
    stop = jax.profiler.stop_trace

    def without_files():
        stop()
        for path in made.rglob("*.*.*"):
            path.unlink()

    monkeypatch.setattr(jax.profiler, "stop_trace", without_files)
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: str(made))
    run = running(tmp_path / "run", "2:3")
    train(run)
    assert run.progress.warned == ["no profile: the profiler wrote no file; training goes on"]
    assert run.progress.said == []


def test_a_libtpu_that_would_end_the_process_is_not_asked_for_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(libtpu, "unfit", lambda: "libtpu 2 is installed, jax 1 wants 1")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    run = running(tmp_path, "2:3")
    train(run)
    assert sessions(tmp_path) == []
    assert "JAX_PLATFORMS=cpu" in run.progress.warned[0]


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.0.42", True), ("0.0.42.1", True), ("0.0.421", False), (None, True)]
)
def test_libtpu_fits_where_jax_was_built_with_it(monkeypatch, installed, fits):
    monkeypatch.undo()

    def version(name):
        if installed is None:
            raise libtpu.PackageNotFoundError
        return installed if name == "libtpu" else "0.10.2"

    monkeypatch.setattr(libtpu, "version", version)
    monkeypatch.setattr(
        libtpu, "requires", lambda name: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"']
    )
    assert (libtpu.unfit() is None) == fits
