"""What SIGINT, SIGTERM and SIGHUP (a closed terminal) do to a run: the first asks it to stop, a
second one ends it at once.

Python runs its own signal handlers between two instructions of the main thread, which may be
minutes away while a program compiles. So the C-level handler writes to a pipe, and a thread
reads it: it notes the first request and ends the process at the second, whatever the main thread
does. Checkpoints on disk are complete at any moment, so leaving at once loses only what came
after the last one.
"""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from glamcli.progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# GNU `timeout` sends its signal to the process and to the process's group.
REPEAT_SECONDS = 1.0
"""within these, a signal that comes again is the same request."""


def show_cursor() -> None:
    """Shows the terminal's cursor, which live bars hide."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")


class Stop:
    """Whether the run should stop; read at every step boundary."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at_once = True
        """before training starts there is nothing to save, so the first signal interrupts."""

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def listening(progress: Progress) -> Iterator[Stop]:
    """Turns `SIGNALS` into requests for as long as the context is open. Until `at_once` is set to
    False, a request raises KeyboardInterrupt in the main thread. SIGHUP stays ignored where it was
    (`nohup`)."""
    stop = Stop()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    interrupted = False

    def interrupt(signum: int, frame: object) -> None:
        # The main thread sees it at once; the thread below may wait for the interpreter first,
        # and a short run would be over by then.
        nonlocal interrupted
        del frame
        stop.signal = signal.Signals(signum)
        if stop.at_once and not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    heeded = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, interrupt) for number in heeded}
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(receiver, stop, progress), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()
        thread.join()
        receiver.close()


def _listen(receiver: socket.socket, stop: Stop, progress: Progress) -> None:
    last: dict[int, float] = {}
    while received := receiver.recv(16):
        for number in received:
            now = time.monotonic()
            if number not in SIGNALS or now - last.get(number, -math.inf) < REPEAT_SECONDS:
                continue
            if last:
                show_cursor()
                os._exit(128 + number)
            last[number] = now
            stop.signal = signal.Signals(number)
            if not stop.at_once:
                progress.say(
                    f"{stop.signal.name} received: saving after this step "
                    "(a second one leaves at once)"
                )
