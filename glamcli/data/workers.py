"""The same work on many pieces of data, in several processes: started with the first piece, ended
with the `with` block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from glamcli.errors import DataError

# Of the worker process: set once when it starts, so that what work needs does not travel with every
# piece.
_work: Callable[..., Any] | None = None


class Workers:
    """Does `work` in `processes` processes (0: one per core; 1: in this one).

    `purpose` and `hint` are for the error when a process is killed: what it did, and what helps.
    """

    def __init__(self, work: Callable[..., Any], processes: int, purpose: str, hint: str):
        self._work, self._purpose, self._hint = work, purpose, hint
        self._processes = processes or num_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[Future[Any], Callable[[Any], object]] = {}

    def submit(self, *piece: Any, then: Callable[[Any], object] = lambda result: None) -> None:
        """Starts the work on a piece, whose result `then` receives; waits first when every process
        has one to do and one to come.

        Raises: what the work on a piece raised.
        """
        if self._processes == 1:
            then(self._work(*piece))
            return
        if self._pool is None:
            # Not fork: the caller may have threads (JAX does), which a fork would cut off.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, context, _start, (self._work,))
        self.wait(2 * self._processes - 1)
        self._pending[self._pool.submit(_run, *piece)] = then

    def wait(self, num_left: int = 0) -> None:
        """Returns when so few pieces are left. Raises: what the work on a piece raised."""
        while len(self._pending) > num_left:
            for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
                self._pending.pop(future)(future.result())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            what = f"a process that {self._purpose} ended unexpectedly (out of memory?)"
            raise DataError(what, self._hint) from error


def num_cores() -> int:
    """Cores this process may use, which containers often make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(work: Callable[..., Any]) -> None:
    """Runs in every worker process before its first piece."""
    global _work
    _work = work
    # Ctrl-C reaches the whole process group; only the parent reacts, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(*piece: Any) -> Any:
    assert _work is not None
    return _work(*piece)
