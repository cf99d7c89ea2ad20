"""Several processes as one run: how they find each other, agree, and end together.

`joined` connects the processes (a TPU pod, Slurm, Open MPI, or by hand) before jax looks at its
devices. Everything else sees a `Host`: which process this is, and `gather`, by which all of them
agree on something. A run of one process is `ALONE`; it opens no socket and pays nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from glamcli.config.schema import Runtime
from glamcli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    DataError,
    GlamError,
    Preempted,
    RecipeError,
)
from glamcli.hosts.wire import GONE_SECONDS, Wire, meet, split_address
from glamcli.progress import Progress, Silent

LEAVE_SECONDS = 5.0
"""what a failing process has for tidying up; its files are whole at any moment."""
NEWS_SECONDS = 3 + GONE_SECONDS
"""after these it is known who is gone; `end` then ends this process."""
SEEN_SECONDS = 5.0
SHUTDOWN_SECONDS = 60

# What jax knows of and is meant by several processes; in Kubernetes most programs are alone.
CLUSTERS = {"slurm": "Slurm", "ompi": "Open MPI", "gcetpu": "the TPU VM", "gketpu": "the TPU pod"}

Tell = Callable[[str, str | None], None]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Place:
    """Where the processes of a run meet, and which one this is."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """devices of this machine that are this process's; None is all of them."""
    listen: str | None = None
    """where process 0 listens; None is at `coordinator`, and nowhere else."""


@dataclass
class Host:
    """This process among those of a run."""

    index: int = 0
    count: int = 1
    wire: Wire | None = None
    tell: Tell = lambda what, hint: None
    on_end: list[Callable[[], object]] = field(default_factory=list)
    """what to do, quickly, when this process ends because another one did."""
    has_failed: bool = False
    """whether this process has told the others that it failed."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def name(self, index: int) -> str:
        return f"process {index}" if self.wire is None else self.wire.names[index]

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values (for JSON) of all processes in their order; all must call this alike."""
        return [value] if self.wire is None else self.wire.gather(name, value)

    def wait(self, name: str) -> None:
        """Returns when all processes have called this."""
        self.gather(name, None)

    def any(self, name: str, value: bool) -> bool:
        """Whether it is so in any process: the same answer in all of them."""
        return any(self.gather(name, value))

    def alike(
        self,
        name: str,
        make: Callable[[], Made],
        told: Callable[[Made], Any] = lambda made: None,
    ) -> Made:
        """What `make` makes, once all processes have made it and told the same of it (for JSON).

        A process that goes on without another one waits for it for ever; so what each reads for
        itself is read through this. `make` must not wait for other processes.

        Raises: GlamError in all processes when `make` raises it in one, or they differ.
        """
        if self.count == 1:
            return make()
        made, error, mine = None, None, {}
        try:
            made = make()
            mine["told"] = told(made)
        except GlamError as caught:
            error = caught
            mine["error"] = [caught.what, caught.hint]
        theirs = self.gather(name, mine)
        if error is not None:
            raise error
        for index, each in enumerate(theirs):
            if "error" in each:
                what, hint = each["error"]
                raise DataError(f"{self.name(index)}: {what}", hint=hint)
        odd = [self.name(index) for index, each in enumerate(theirs) if each != theirs[0]]
        if odd:
            raise DataError(
                f"{name}: not the same in {', '.join(odd)} as in {self.name(0)}",
                hint="all machines need the same files",
            )
        return made  # pyright: ignore[reportReturnType]

    def shares(self, folder: Path) -> list[bool]:
        """Of every process, whether it sees the same folder as process 0 under this path."""
        if self.count == 1:
            return [True]
        mark = folder / f".seen-{secrets.token_hex(8)}"
        if self.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        name = self.gather("mark", mark.name)[0]
        seen = self.gather("seen", self.is_first or _appears(folder / name))
        if self.is_first:
            mark.unlink(missing_ok=True)
        return seen

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tells the other processes, at once, when this one fails.

        Enter it last: what is left open may wait for processes that wait for this one, so after
        `LEAVE_SECONDS` the process ends as it is.
        """
        try:
            yield
        except BaseException as error:
            told = self.has_failed or isinstance(error, Preempted)
            if self.wire is not None and not told:
                self.has_failed = True
                self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        assert self.wire is not None
        if _may_follow_another(error):
            time.sleep(NEWS_SECONDS)
        if isinstance(error, GlamError):
            what, hint, code = error.what, error.hint, error.exit_code
            error.is_told = True
            self.tell(what, hint)
        elif isinstance(error, KeyboardInterrupt):
            what, hint, code = "interrupted", None, EXIT_INTERRUPTED
        elif isinstance(error, BrokenPipeError):
            what, hint, code = "its output pipe was closed", None, EXIT_BROKEN_PIPE
        else:
            first = next(iter(str(error).splitlines()), "")
            what, hint, code = f"{type(error).__name__}: {first}", None, 1
        self.wire.fail(what, hint, code)

        def leave() -> None:
            sys.stderr.flush()
            os._exit(code)

        timer = threading.Timer(LEAVE_SECONDS, leave)
        timer.daemon = True
        timer.start()

    def end(self, what: str, hint: str | None, code: int) -> None:
        """Ends this process because another one failed or is gone."""
        self.tell(what, hint)
        for action in self.on_end:
            with suppress(Exception):
                action()
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _may_follow_another(error: BaseException) -> bool:
    """Whether another process may be behind it: a collective that breaks off, in a step or inside
    a save, is how a process first feels that another is gone. Who it was is known a little later.
    """
    if not isinstance(error, GlamError):
        return not isinstance(error, KeyboardInterrupt | BrokenPipeError)
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


ALONE = Host()


class Aside(Silent):
    """Progress of a process that is not the first: only what is said about its own machine."""

    def __init__(self, progress: Progress, index: int):
        self._progress = progress
        self._prefix = f"process {index}: "

    def say(self, text: str) -> None:
        self._progress.say(self._prefix + text)

    def warn(self, text: str) -> None:
        self._progress.warn(self._prefix + text)


def whole(x: jax.Array) -> np.ndarray:
    """The array in this process's memory, also where other processes hold parts of it; all of
    them must then call this alike."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def place_asked(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
    """The three options together, or None without any.

    Raises: RecipeError when they make no sense.
    """
    if coordinator is None and num_processes is None and process_id is None:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise RecipeError(
            "--coordinator, --num-processes and --process-id belong together",
            hint="leave out all three on a TPU pod and under Slurm or Open MPI",
        )
    split_address(coordinator)
    if not 0 <= process_id < num_processes:
        raise RecipeError(
            f"--process-id is {process_id}, of {num_processes} processes",
            hint=f"process ids are 0 to {num_processes - 1}",
        )
    return Place(coordinator, num_processes, process_id)


def place_detected(seconds: float) -> Place | None:
    """What a TPU pod, Slurm or Open MPI says about this process; None when it is the only one.

    Raises: RecipeError when there is such a cluster but it does not say enough.
    """
    known = (each for each in ClusterEnv._cluster_types if each.name in CLUSTERS)
    cluster = next((each for each in known if each.is_env_present()), None)
    if cluster is None:
        return None
    try:
        count = cluster.get_process_count()
        if count == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cluster.get_coordinator_address(int(seconds), port)
        index, device = cluster.get_process_id(), cluster.get_local_process_id()
    except Exception as error:
        raise RecipeError(
            f"{CLUSTERS[cluster.name]} does not say which process of a run this is: {error}",
            hint="say so with --coordinator, --num-processes and --process-id",
        ) from error
    host, port = split_address(address)
    # Debian gives a machine's own name an address that other machines cannot reach.
    with suppress(OSError):
        host = socket.gethostbyname(host)
    listen = f"0.0.0.0:{port}" if host.startswith("127.") else None
    # As jax does: one process per GPU of a machine.
    return Place(address, count, index, None if device is None else (device,), listen)


@contextmanager
def joined(place: Place | None, runtime: Runtime, progress: Progress, tell: Tell) -> Iterator[Host]:
    """This process among the others of its run, who are all there when this returns.

    `place` None looks for a cluster around this process. Enter it before jax looks at its devices.
    `tell` shows an error: that of another process, because of which this one ends.

    Raises:
        RecipeError: the coordinator's address cannot be used.
        HostError: some processes did not come.
    """
    place = place or place_detected(runtime.join_seconds)
    if place is None or place.num_processes == 1:
        yield Host()
        return
    with progress.phase(f"waiting for {place.num_processes} processes at {place.coordinator}"):
        listen = place.listen or place.coordinator
        index, count = place.process_id, place.num_processes
        wire = meet(place.coordinator, listen, index, count, runtime.join_seconds)
    host = Host(index, count, wire, tell)
    wire.start(host.end)
    with host.failing_together():
        _keep_stdout()
        _initialise(place, runtime)
        try:
            yield host
        except Preempted:
            wire.close(jax.distributed.shutdown)
            raise
        wire.close(jax.distributed.shutdown)


def _initialise(place: Place, runtime: Runtime) -> None:
    # Its handler of SIGTERM would take the signal away from ours (`signals.py`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(runtime.join_seconds) + 1,
            heartbeat_timeout_seconds=runtime.heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            # By default it would listen on all addresses of the machine.
            coordinator_bind_address=place.listen or place.coordinator,
        )
    except jax.errors.JaxRuntimeError as error:
        raise RecipeError(
            f"jax cannot use {place.coordinator}: {str(error).splitlines()[0]}",
            hint="choose another port",
        ) from error


def _keep_stdout() -> None:
    """Keeps what the libraries below Python print (gloo, on every new group) out of the results."""
    sys.stdout.flush()
    kept = os.dup(sys.stdout.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = os.fdopen(kept, "w", encoding="utf-8", errors="backslashreplace")


def _appears(path: Path) -> bool:
    """Whether the file is there; a file server may show it a little later."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.1)
    return True
