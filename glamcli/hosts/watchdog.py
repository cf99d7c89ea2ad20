"""Ends a process that gets no further: says where it is, shows its stacks, exits with 86.

A process whose peer hangs waits in a collective without end, while its heartbeat says that all is
well. A thread watches the time; for when a library keeps the interpreter's lock from it,
`faulthandler` shows the stacks a little later and exits with 1 (docs/decisions/0008).
"""

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from glamcli.config.schema import Runtime
from glamcli.errors import EXIT_WATCHDOG
from glamcli.hosts.join import Host

EXIT_AFTER_SECONDS = 1.5
# Process 0 last: when the coordinator is gone, jax aborts the others.
FIRST_EXITS_AFTER_SECONDS = 4.0
# Later than that, the interpreter must be locked: the thread looks once a second.
LOCKED_SECONDS = 1.5
LONG = 10
"""compiling, restoring and saving may take this many times as long as a step."""


class Watchdog(AbstractContextManager["Watchdog"]):
    """Exits with 86 if `seconds` pass without `beat()`; None disables it."""

    def __init__(
        self,
        seconds: float | None,
        name: str,
        *,
        is_first: bool = True,
        last: Callable[[], object] = lambda: None,
    ):
        """`last` is called before it exits."""
        self._last = last
        self.seconds = seconds
        self.name = name
        """of this process, for the message."""
        self._exit_after = FIRST_EXITS_AFTER_SECONDS if is_first else EXIT_AFTER_SECONDS
        self._until = (math.inf, "")
        """when this process is stuck, and what it then says."""
        self._over = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def beat(self, where: str, times: float = 1) -> None:
        """Starts the time again: what begins now, `where`, may take `times` as long as a step."""
        if self.seconds is None:
            return
        seconds = self.seconds * times
        what = f"error: {self.name} got no further for {seconds:g} s, {where}; its stacks:\n"
        self._until = (time.monotonic() + seconds, what)
        faulthandler.dump_traceback_later(seconds + self._exit_after + LOCKED_SECONDS, exit=True)

    def rest(self) -> None:
        """Stops the time until the next beat: what begins now, such as waiting for a person, may
        take any time."""
        self._until = (math.inf, "")
        faulthandler.cancel_dump_traceback_later()

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._over.set()

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(min(1.0, seconds / 10)):
            until, what = self._until
            if time.monotonic() > until:
                # Not through Python's streams: the stuck thread may be inside one of them.
                os.write(2, what.encode(errors="replace"))
                faulthandler.dump_traceback(2)
                if not self._over.wait(self._exit_after) and self._until[0] == until:
                    faulthandler.cancel_dump_traceback_later()  # nothing locks the interpreter
                    with suppress(Exception):
                        self._last()
                    os._exit(EXIT_WATCHDOG)


def make_watchdog(runtime: Runtime, host: Host) -> Watchdog:
    """What ends this process when it makes no progress; alone it never does."""
    seconds = runtime.step_timeout_seconds if host.count > 1 else None
    name = host.name(host.index)
    return Watchdog(seconds, name, is_first=host.is_first, last=lambda: host.last())
