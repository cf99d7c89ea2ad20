"""Fixtures: whole runs in processes of their own, small enough to be interrupted many times."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glamcli.hosts.pace import PACE_KEYS
from glamcli.train.memory_use import MEMORY_KEYS
from glamcli.train.speed import SPEED_KEYS
from glamcli.train.times import TIME_KEYS

# Keys that depend on the clock; everything else in `metrics.jsonl` is the same in a repeated run.
WALL_CLOCK = (
    *("unix_seconds", "seconds_per_step", "tokens_per_second", "seconds_left"),
    *(*PACE_KEYS, *SPEED_KEYS, *TIME_KEYS, *MEMORY_KEYS),
)
STEPS = 40
RECIPE = f"""
extends: test-tiny
model: {{model_dim: 16, ffn_dim: 32, head_dim: 8, vocab_size: 260}}
moe: {{group_tokens: 32, second_policy: random}}
batch: {{row_tokens: 32}}
train: {{steps: {STEPS}}}
every: {{log_steps: 3, heldout_steps: 10, checkpoint_steps: 7}}
data: {{mixture: ./mixture.yaml, cache_dir: ./cache}}
"""
MIXTURE = """
sources:
  numbers: {kind: text, path: numbers.txt, separator: line, weight: 0.7}
  words: {kind: text, path: words.txt, separator: line, weight: 0.3}
heldout_frac: 0.1
"""
LONG = ("--set", "train.steps=100000")
SMALL = (
    *("--set", "moe=null", "--set", "model.num_layers=1", "--set", "model.ffn_dim=16"),
    *("--set", "every.heldout_steps=null", "--set", "heldout.rows=1"),
)
# Something that process 1 of several does at a step that it was given.
AT_THE_TENTH = """
import ctypes, os, signal, sys, time
import jax
from glamcli.errors import DataError
from glamcli.train import loop
calls, put = iter(range(10**6)), loop.global_batch
def hang(*batch):
    if jax.process_index() == 1 and next(calls) {when}:
        {what}
    return put(*batch)
loop.global_batch = hang
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def write_recipe(folder: Path) -> Path:
    """A recipe of forty small steps with its mixture and documents."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "mixture.yaml").write_text(MIXTURE)
    numbers = "\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(400))
    words = "\n".join(f"the {a} {b} sees a {b} {a}" for a in COLOURS for b in ANIMALS)
    (folder / "numbers.txt").write_text(numbers)
    (folder / "words.txt").write_text(words)
    return folder / "tiny.yaml"


COLOURS = ("red", "green", "blue", "grey", "yellow", "white", "black", "brown")
ANIMALS = ("fox", "hen", "cat", "dog", "horse", "mouse", "goat", "duck")


class Run:
    """`glam train` in its own process, its events read as they come."""

    def __init__(
        self,
        recipe: Path,
        folder: Path,
        *arguments: str,
        num_devices: int = 1,
        first: str = "",
        **environment: str,
    ):
        """`first` is Python to run before the command."""
        variables = {
            **os.environ,
            **environment,
            "JAX_PLATFORMS": "cpu",
            # Nothing here runs long enough to repay optimisation.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={num_devices}",
        }
        start = [sys.executable, "-c", f"{first}\nfrom glamcli.cli.main import run; run()"]
        self.folder = folder
        # Not a pipe: nobody reads it while the events are read, and a full one holds the run up.
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*start, "train", str(recipe), "--run", str(folder), "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
            env=variables,
        )

    def events(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until_step(self, step: int) -> None:
        """Returns once a step this late was told."""
        for event in self.events():
            if event["event"] == "step" and event["step"] >= step:
                return
        pytest.fail(f"ended before step {step}: {self.finish()}")

    def until(self, event: str, **values: Any) -> None:
        for each in self.events():
            if each["event"] == event and values.items() <= each.items():
                return
        pytest.fail(f"ended before {event} {values}: {self.finish()}")

    def finish(self) -> tuple[int, str]:
        """Exit code and everything on stderr; what was left of stdout is in `rest`."""
        self.rest, _ = self.process.communicate(timeout=300)
        if not self._err.closed:
            with self._err:
                self._err.seek(0)
                self._said = self._err.read()
        assert "Traceback" not in self._said, self._said
        return self.process.returncode, self._said

    def end(self) -> None:
        """Ends it, if it runs."""
        self.process.kill()
        self.process.communicate()
        self._err.close()


def kill_at_a_random_moment(run: Run, rng: random.Random, num_lines: int = 12) -> None:
    """While it imports, restores or compiles, or after fewer than `num_lines` lines of output."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 8))
    else:
        lines = rng.randrange(1, num_lines)
        for _, _ in zip(range(lines), run.events(), strict=False):
            pass
        time.sleep(rng.uniform(0, 0.05))
    run.process.kill()
    run.finish()


def wait_until(is_so: Callable[[], object]) -> None:
    """Asks again and again, for a minute at most."""
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP holds a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def train(recipe):
    """Starts runs, and ends those that a failed test left behind."""
    started = []

    def start(folder: Path, *arguments: str, recipe: Path = recipe, **options: Any) -> Run:
        started.append(Run(recipe, folder, *arguments, **options))
        return started[-1]

    yield start
    for run in started:
        run.end()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def several(train):
    """Starts the processes of one run, process 0 last."""

    def start(
        folder: Path, *arguments: str, of: int = 2, only: int | None = None, **options
    ) -> list[Run]:
        address = f"127.0.0.1:{free_port()}"
        runs = {}
        for k in reversed(range(of)) if only is None else [only]:
            place = ("--coordinator", address, "--num-processes", str(of), "--process-id", str(k))
            mine = {name: value(k) if callable(value) else value for name, value in options.items()}
            runs[k] = train(folder, *place, *arguments, num_devices=4, **mine)
        return [runs[k] for k in sorted(runs)]

    return start


def finished(runs: list[Run]) -> list[str]:
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [0] * len(runs), ends
    return [err for _, err in ends]


@pytest.fixture(scope="session")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to; what it told is beside it."""
    run = Run(recipe, tmp_path_factory.mktemp("runs") / "uninterrupted")
    told = [json.dumps(event) + "\n" for event in run.events()]
    (run.folder.parent / "events.jsonl").write_text("".join(told))
    code, err = run.finish()
    assert code == 0, err
    return run.folder


def weights(folder: Path, step: int) -> dict[str, Any]:
    """Every array of a checkpoint by name: weights, optimizer state, counters."""
    import jax
    import numpy as np

    from glamcli.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)
        for name, (dtype, shape) in checkpoints.meta(step)["tree"].items()
    }
    return {name: np.asarray(x) for name, x in checkpoints.restore(step, target).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def assert_continues(run: Run, step: int, uninterrupted: Path) -> None:
    """The run, just started, continues from a saved step and ends as if nothing had happened."""
    run.until("say", text=f"continuing from step {step}")
    code, err = run.finish()
    assert code == 0, err
    assert_same_run(uninterrupted, run.folder)


def assert_same_run(left: Path, right: Path, step: int = STEPS) -> None:
    before, after = weights(left, step), weights(right, step)
    assert before.keys() == after.keys()
    different = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert not different
    assert metrics(left) == metrics(right)
