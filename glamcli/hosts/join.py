"""Several processes as one run: how they find each other, agree, and end together.

`joined` connects the processes (of a TPU pod, of Slurm, of Open MPI, or started by hand) before jax
looks at its devices. Everything else sees a `Host`: which process this is, and `gather`, by which
all of them agree on something. A run of one process is `ALONE`: it opens no socket.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from glamcli.config.schema import Runtime
from glamcli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    DataError,
    GlamError,
    Preempted,
    RecipeError,
    causes,
)
from glamcli.hosts.greeting import meet
from glamcli.hosts.rendezvous import Rendezvous, detected_rendezvous
from glamcli.hosts.wire import GONE_SECONDS, MESSAGE_BYTES, Wire
from glamcli.progress import Progress

LEAVE_SECONDS = 5.0
"""what a failing process has for tidying up; its files are whole at any moment."""
OTHERS_SECONDS = 1 + LEAVE_SECONDS
"""by then the others have left too."""
NEWS_SECONDS = 3 + GONE_SECONDS
"""by then it is known which process is gone, and `end` ends this one."""
SEEN_SECONDS = 5.0
SHUTDOWN_SECONDS = 60

Tell = Callable[[str, str | None], None]
_Made = TypeVar("_Made")


@dataclass
class Host:
    """This process among those of a run."""

    index: int = 0
    count: int = 1
    wire: Wire | None = None
    tell: Tell = lambda what, hint: None
    has_failed: bool = False
    """whether this process has told the others that it failed."""
    last: Callable[[], object] = lambda: None
    """called, from any thread, when this process ends without leaving what is open."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def name(self, index: int) -> str:
        return f"process {index}" if self.wire is None else self.wire.names[index]

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values (for JSON) of all processes in their order; all must call this alike."""
        return [value] if self.wire is None else self.wire.gather(name, value)

    def of_first(self, name: str, value: Any) -> Any:
        """The first process's value (for JSON) in all of them, of any size; that of the others does
        not matter. All must call this alike."""
        if self.wire is None:
            return value
        # As text inside a message, quotes and backslashes take twice the bytes.
        text, size = json.dumps(value) if self.is_first else "", MESSAGE_BYTES // 4
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        num_parts = self.gather(f"{name}: parts", len(parts))[0]
        parts += [""] * (num_parts - len(parts))
        return json.loads("".join(self.gather(name, part)[0] for part in parts))

    def wait(self, name: str) -> None:
        """Returns when all processes have called this."""
        self.gather(name, None)

    def any(self, name: str, value: bool) -> bool:
        """Whether `value` is true in any process: the same answer in all of them."""
        return any(self.gather(name, value))

    def alike(
        self,
        name: str,
        make: Callable[[], _Made],
        compared: Callable[[_Made], Any] = lambda made: None,
    ) -> _Made:
        """What `make` returns, once all processes have made it and `compared` (for JSON) is equal.

        A process that goes on without another one waits for it without end; so what each process
        reads for itself is read through this. `make` must not wait for other processes.

        Raises: GlamError in all processes when `make` raises it in one, or they differ.
        """
        if self.count == 1:
            return make()
        try:
            made = make()
            mine = {"made": compared(made)}
        except GlamError as error:
            self.gather(name, {"error": [error.what, error.hint]})
            raise
        theirs = self.gather(name, mine)
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
        return made

    def shares(self, folder: Path) -> list[bool]:
        """For every process, whether this path leads it to the same folder as process 0."""
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
            if self.wire is not None and not (self.has_failed or isinstance(error, Preempted)):
                self.has_failed = True
                self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        assert self.wire is not None
        if _may_follow_another(error):
            time.sleep(NEWS_SECONDS)
        if isinstance(error, GlamError):
            what, hint, code = error.what, error.hint, error.exit_code
            error.is_shown = True
            self.tell(what, hint)
        elif isinstance(error, KeyboardInterrupt):
            what, hint, code = "interrupted", None, EXIT_INTERRUPTED
        elif isinstance(error, BrokenPipeError):
            what, hint, code = "its output pipe was closed", None, EXIT_BROKEN_PIPE
        else:
            first = next(iter(str(error).splitlines()), "")
            what, hint, code = f"{type(error).__name__}: {first}", None, 1
        self.wire.fail(what, hint, code)
        self._let_others_leave()
        timer = threading.Timer(LEAVE_SECONDS, self._leave, [code])
        timer.daemon = True
        timer.start()

    def end(self, what: str, hint: str | None, code: int) -> None:
        """Ends this process because another one failed or is gone."""
        self.tell(what, hint)
        with suppress(Exception):
            sys.stdout.flush()
        self._let_others_leave()
        self._leave(code)

    def end_all(self, what: str, code: int) -> None:
        """Ends this process, which has said why, and then all others at once."""
        if self.wire is not None:
            self.wire.fail(what, None, code)
        self._let_others_leave()
        self._leave(code)

    def _leave(self, code: int) -> None:
        with suppress(Exception):
            self.last()
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(code)

    def _let_others_leave(self) -> None:
        """Process 0 leaves last: jax aborts a process that misses the coordinator, and its exit
        code is lost."""
        if self.is_first and self.wire is not None:
            self.wire.wait_for_others(OTHERS_SECONDS)


def _may_follow_another(error: BaseException) -> bool:
    """Whether another process may have caused it: a collective that breaks off, in a step or inside
    a save, is the first sign that another process is gone. Which one is known a little later."""
    if not isinstance(error, GlamError):
        return not isinstance(error, KeyboardInterrupt | BrokenPipeError)
    return any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes(error))


ALONE = Host()


@contextmanager
def joined(
    rendezvous: Rendezvous | None, secret: bytes, runtime: Runtime, progress: Progress, tell: Tell
) -> Iterator[Host]:
    """This process among the others of its run, who are all there when this returns.

    `rendezvous` None looks for a cluster around this process. Enter it before jax looks at its
    devices. All processes have the same `secret`. `tell` shows the error of another process that
    ends this one.

    Raises:
        RecipeError: the coordinator's address cannot be used, or the secrets differ.
        HostError: some processes did not come.
    """
    here = rendezvous or detected_rendezvous(runtime.join_seconds)
    if here is None or here.num_processes == 1:
        yield Host()
        return
    index, count, listen = here.process_id, here.num_processes, here.listen or here.coordinator
    with progress.phase(f"waiting for {count} processes at {here.coordinator}"):
        wire = meet(
            here.coordinator, listen, index, count, runtime.join_seconds, secret, progress.warn
        )
    host = Host(index, count, wire, tell)
    wire.start(host.end)
    with host.failing_together():
        _keep_stdout()
        _initialise(here, runtime)
        try:
            yield host
        except Preempted:
            wire.close(jax.distributed.shutdown)
            raise
        wire.close(jax.distributed.shutdown)


def _initialise(here: Rendezvous, runtime: Runtime) -> None:
    # Its handler of SIGTERM would take the signal away from ours (`signals.py`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            here.coordinator,
            here.num_processes,
            here.process_id,
            local_device_ids=here.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(runtime.join_seconds) + 1,
            heartbeat_timeout_seconds=runtime.heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            # By default it would listen on all addresses of the machine.
            coordinator_bind_address=here.listen or here.coordinator,
        )
    except jax.errors.JaxRuntimeError as error:
        raise RecipeError(
            f"jax cannot use {here.coordinator}: {str(error).splitlines()[0]}",
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
