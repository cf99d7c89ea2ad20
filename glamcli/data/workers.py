"""Processes that make parts: started when the first part comes, ended with the block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from glamcli.data.parts import Part, make_part
from glamcli.data.tokenizer import Tokenizer
from glamcli.errors import DataError

# Of the worker process: set once when it starts, so a tokenizer travels once and not per part.
_tokenizer: Tokenizer | None = None


class Workers:
    """Makes parts in `processes` processes (0: one per core; 1: in this one)."""

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self.tokenizer = tokenizer
        self.processes = processes or num_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._pending: set[Future[None]] = set()

    def submit(self, part: Part) -> None:
        """Starts a part; waits first when every process has one to do and one to come."""
        if self.processes == 1:
            make_part(part, self.tokenizer)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.processes,
                # Not fork: the caller may have threads (JAX does), which a fork would cut off.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.tokenizer,),
            )
        while len(self._pending) >= 2 * self.processes:
            self._collect(FIRST_COMPLETED)
        try:
            self._pending.add(self._pool.submit(_make, part))
        except BrokenProcessPool as error:
            raise _died() from error

    def wait(self) -> None:
        """Returns when every part is made. Raises: what a part raised."""
        while self._pending:
            self._collect(FIRST_COMPLETED)

    def _collect(self, when: str) -> None:
        done, self._pending = wait(self._pending, return_when=when)
        for future in done:
            try:
                future.result()
            except BrokenProcessPool as error:
                raise _died() from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _died() -> DataError:
    return DataError(
        "a process that prepares rows ended unexpectedly (out of memory?)",
        hint="run again: finished parts are kept; fewer `data.prepare_processes` need less memory",
    )


def _start(tokenizer: Tokenizer) -> None:
    """Runs in every worker process before its first part."""
    global _tokenizer
    _tokenizer = tokenizer
    # Ctrl-C reaches the whole process group; only the parent reacts, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(part: Part) -> None:
    assert _tokenizer is not None
    make_part(part, _tokenizer)
