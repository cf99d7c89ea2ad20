"""Trackio and Weights & Biases, each in a process of its own (`logger_process.py`).

Their packages open connections, start threads, wait for servers and end programs in their own ways;
in another process none of that reaches a run, which never waits for them but for `CLOSE_SECONDS` at
its end. A pipe that takes no more is noticed and costs lines.
"""

import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from glamcli import atomic
from glamcli.config.schema import Recipe
from glamcli.errors import RecipeError, named, redacted
from glamcli.hosts.join import Host
from glamcli.progress import Progress
from glamcli.train.metric_files import TensorBoard, curves
from glamcli.untrusted import parse_json, read_file

NAMES = {"trackio": "Trackio", "wandb": "Weights & Biases"}
"""Loggers by module, which is the name of their extra as well."""
MAX_UNSENT_BYTES = 1 << 20
CLOSE_SECONDS = 5.0
LINGER_SECONDS = 60.0
"""how long the process may go on after its run, to send what it has."""
LOGGED_AS = "logged_as.json"
"""the file with the name of a run in loggers: one that is resumed goes on there."""
_PROGRAM = "from glamcli.train.logger_process import main; main()"


class Writer(Protocol):
    """Something that the numbers of a run go to."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Adds a summary at its `step`."""

    def flush(self) -> None:
        """Everything so far is safe when this returns, as far as it can be."""

    def close(self) -> None:
        """Ends it."""


def check_loggers(recipe: Recipe, host: Host) -> None:
    """Raises: RecipeError, in all processes, for a logger that is not installed where the first of
    them runs."""
    wanted = [module for module in recipe.run.loggers if module in NAMES]
    missing = [module for module in wanted if importlib.util.find_spec(module) is None]
    for module in host.gather("missing loggers", missing)[0]:
        what = f"`run.loggers` asks for {NAMES[module]}, but `{module}` is not installed"
        raise RecipeError(what, hint=f"pip install 'glamcli[{module}]'", key="run.loggers")


def open_loggers(recipe: Recipe, run_dir: Path, step: int, progress: Progress) -> list[Writer]:
    """Those of a recipe, for a run that continues after `step`."""
    opened: list[Writer] = []
    for name in dict.fromkeys(recipe.run.loggers):
        if name == "tensorboard":
            opened.append(TensorBoard(run_dir / "tensorboard", step, progress))
        else:
            opened.append(ProcessLogger(name, recipe, run_dir, progress))
    return opened


class ProcessLogger:
    """A logger that gets its lines through a pipe, and answers through another."""

    def __init__(self, module: str, recipe: Recipe, run_dir: Path, progress: Progress):
        self._name, self._progress = NAMES[module], progress
        self._unsent, self._answers = b"", b""
        self._num_lost, self._has_warned = 0, False
        # Its modules are those of this process, wherever they were found.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self._warn(f"cannot be started ({error.strerror or error})")
            return
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(_fd(pipe), False)
        self._send(
            module=module,
            project=recipe.run.project,
            name=_logged_as(run_dir),
            folder=str(run_dir.absolute()),
            config=_redacted(recipe.model_dump(mode="json")),
            linger_seconds=LINGER_SECONDS,
        )

    def write(self, values: Mapping[str, Any]) -> None:
        """Sends the numbers of a summary, or leaves them out; never waits."""
        numbers = {tag: x for name, value in values.items() for tag, x in curves(name, value)}
        if numbers:
            self._send(step=values["step"], numbers=numbers)
        self._listen()

    def flush(self) -> None:
        """Nothing: a run waits for no logger."""

    def close(self) -> None:
        """Waits a few seconds for everything to be taken; then leaves the process to itself."""
        if (process := self._process) is None:
            return
        until = time.monotonic() + CLOSE_SECONDS
        taking = select.poll()  # `select.select` knows no descriptor above 1,023
        while self._unsent and (left := until - time.monotonic()) > 0:
            taking.register(_fd(process.stdin), select.POLLOUT)
            taking.poll(left * 1000)
            self._pump()
        with suppress(OSError):
            _opened(process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        self._listen()
        _opened(process.stdout).close()
        self._process = None
        if process.returncode is None:
            _lingering.append(process)
            text = f"{self._name} has not taken everything: it may go on for {LINGER_SECONDS:g} s"
            self._progress.warn(text)
        if self._num_lost:
            self._progress.warn(f"{self._name}: lines left out: {self._num_lost:,}")

    def _send(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        if self._process is None or self._process.poll() is not None:
            self._num_lost += 1
        elif len(self._unsent) + len(line) > MAX_UNSENT_BYTES:
            self._num_lost += 1
            self._warn("does not read, lines are left out")
        else:
            self._unsent += line
            self._pump()

    def _pump(self) -> None:
        """Sends as much as the pipe takes."""
        assert self._process is not None
        try:
            while self._unsent:
                sent = os.write(_fd(self._process.stdin), self._unsent)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            pass
        except OSError:  # the process is gone; `_listen` says why
            self._num_lost += self._unsent.count(b"\n")
            self._unsent = b""

    def _listen(self) -> None:
        """Tells what the process answered: where the run is to be seen, and the first trouble."""
        if self._process is None:
            return
        with suppress(BlockingIOError):
            while more := os.read(_fd(self._process.stdout), 1 << 16):
                self._answers += more
        *lines, self._answers = self._answers.split(b"\n")
        for line in lines:
            kind, _, text = line.decode(errors="replace").partition(" ")
            if kind == "at":
                self._progress.say(f"{self._name}: {redacted(text)}")
            elif kind == "lost":
                self._num_lost += int(text)
            else:
                self._warn(f"failed ({redacted(text)})")
        if self._process.poll():
            self._warn(f"has ended with {self._process.returncode}")

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._progress.warn(f"{self._name} {what}; training goes on")


_lingering: list[subprocess.Popen[bytes]] = []
"""processes that were left to themselves."""


def _redacted(value: Any) -> Any:
    """The same JSON value without the credentials in the URLs of its texts and names."""
    if isinstance(value, dict):
        return {redacted(name): _redacted(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    return redacted(value) if isinstance(value, str) else value


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _fd(pipe: IO[bytes] | None) -> int:
    return _opened(pipe).fileno()


def _logged_as(run_dir: Path) -> str:
    """The name of a run in loggers, the same each time that it is resumed."""
    path = run_dir / LOGGED_AS
    with suppress(OSError, ValueError, LookupError, TypeError):
        name = parse_json(read_file(path, 10_000))["name"]
        if re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
            return name
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(named(str(run_dir.absolute()))).name)[:60]
    name = f"{folder}-{uuid.uuid4().hex[:8]}"
    with suppress(OSError):  # then it is another run when it is resumed
        atomic.write(path, json.dumps({"name": name}) + "\n")
    return name
