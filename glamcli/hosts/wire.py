"""One TCP line from every process of a run to process 0, for as long as the run lives.

`jax.distributed` lets processes compute together, but it ends the whole process without a word of
Python when another one is missing or dies, and only after its heartbeat. A line of our own says
at once who is missing, who died and why, and carries small values between all processes. Process
0 listens on the coordinator's address until everybody has come, and then leaves the port to
`jax.distributed`; the lines stay open.

A message is one JSON object per line. Nothing is authenticated: the address belongs in a private
network, as that of `jax.distributed` does.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from glamcli.errors import GlamError, HostError, RecipeError

HELLO_SECONDS = 5.0
# All processes of a run that hangs end by their watchdogs, not because one of them was the first.
GONE_SECONDS = 10.0
RETRY_SECONDS = 0.2
# A machine that lost power or network says nothing: the kernel asks it, whatever Python does there.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}

Message = dict[str, Any]


class Line:
    """Messages over one socket; several threads may send."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.socket = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends, unless the other side is gone: whoever reads finds that out."""
        with self._lock, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None when the other side is gone or talks of something else."""
        try:
            message = json.loads(self._file.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def is_gone(self) -> bool:
        """Whether the other side, of which no message is awaited, has left."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
            self.socket.close()


class Wire:
    """The lines of this process: to all others in process 0, to process 0 in the others.

    `ended(process, what, hint, code)` is called, once, by a thread of its own when another
    process failed (`what` is its error) or is gone.
    """

    def __init__(self, index: int, names: list[str], lines: dict[int, Line]):
        self.index = index
        self.names = names
        """`process 1 (its machine)` of every process."""
        self.lines = lines
        self.ended: Callable[[str, str | None, int], None] = lambda what, hint, code: None
        self._changed = threading.Condition()
        self._coming: dict[str, dict[int, Any]] = {}
        self._gathered: dict[str, list[Any]] = {}
        self._num_gathered = 0
        self._closing = False
        self._over = False
        self._threads = [
            threading.Thread(target=self._read, args=(peer, line), name=f"wire {peer}")
            for peer, line in lines.items()
        ]

    def start(self, ended: Callable[[str, str | None, int], None]) -> None:
        """Begins to listen to the others."""
        self.ended = ended
        for thread in self._threads:
            thread.start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values (for JSON) of all processes, in their order, once all have called this."""
        key = f"{self._num_gathered} {name}"
        self._num_gathered += 1
        if self.index:
            self._send_all({"put": key, "value": value})
        else:
            self._put(0, key, value)
        with self._changed:
            self._changed.wait_for(lambda: key in self._gathered)
            return self._gathered.pop(key)

    def fail(self, what: str, hint: str | None, code: int) -> None:
        """Tells all others that this process failed and why."""
        with self._changed:
            self._closing = True  # that the others leave now is no news
        self._send_all({"failed": self.index, "what": what, "hint": hint, "code": code})

    def close(self, first: Callable[[], object]) -> None:
        """Ends the lines, once every process has called this and done what comes `first`."""
        self.gather("close", None)
        with self._changed:
            self._closing = True
        self.gather("closing", None)  # from here on, a line that ends is no news to anybody
        first()
        self._send_all({"bye": self.index})
        self._close_lines()

    def cut(self) -> None:
        """Ends the lines at once: to those who still listen this process is gone."""
        self._closing = True
        for line in self.lines.values():
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)
        self._close_lines()

    def _close_lines(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for line in self.lines.values():
            line.close()

    def _read(self, peer: int, line: Line) -> None:
        while (message := line.receive()) is not None:
            if "put" in message:
                self._put(peer, message["put"], message["value"])
            elif "all" in message:
                self._hand_out(message["all"], message["values"])
            elif "failed" in message:
                self._end(message)
            elif "bye" in message:
                return
        if self.index == 0 and not self._closing:
            time.sleep(GONE_SECONDS)
        self._end({"failed": peer, "what": None, "hint": None, "code": HostError.exit_code})

    def _put(self, peer: int, key: str, value: Any) -> None:
        """In process 0: notes a value, and sends all of them when it was the last one."""
        with self._changed:
            values = self._coming.setdefault(key, {})
            values[peer] = value
            if len(values) < len(self.names):
                return
            del self._coming[key]
        ordered = [values[index] for index in range(len(self.names))]
        self._send_all({"all": key, "values": ordered})  # before this process may leave
        self._hand_out(key, ordered)

    def _hand_out(self, key: str, values: list[Any]) -> None:
        with self._changed:
            self._gathered[key] = values
            self._changed.notify_all()

    def _end(self, message: Message) -> None:
        with self._changed:
            if self._closing or self._over:
                return
            self._over = True
        if self.index == 0:
            self._send_all(message)
        name = self.names[message["failed"]]
        if message["what"] is None:
            what = f"{name} is gone: it was killed, or its machine or network failed"
            hint = "see what it said last; rerun the same command on every machine"
        else:
            what, hint = f"{name} failed: {message['what']}", message["hint"]
        self.ended(what, hint, message["code"])

    def _send_all(self, message: Message) -> None:
        for line in self.lines.values():
            line.send(message)


def meet(address: str, listen: str, index: int, count: int, seconds: float) -> Wire:
    """The wire of process `index` of `count`, once all of them have come to `address`.

    Process 0 listens at `listen`.

    Raises:
        RecipeError: the address cannot be used, or the processes were told different things.
        HostError: some did not come within `seconds`; it names them.
    """
    if index == 0:
        return _receive_all(address, _listen(listen, count), count, seconds)
    line = Line(_connect(address, seconds))
    line.send({"glam": 1, "process": index, "of": count, "host": socket.gethostname()})
    answer = line.receive()
    if answer is None or "names" not in answer:
        line.close()
    if answer is None or ("names" not in answer and "refused" not in answer):
        raise HostError(
            f"whoever listens at {address} left without a word",
            hint="was process 0 ended, or is it another program that listens there?",
        )
    if "refused" in answer:
        kind = RecipeError if answer["code"] == RecipeError.exit_code else HostError
        raise kind(answer["refused"], hint=answer["hint"])
    return Wire(index, answer["names"], {0: line})


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 host stands in brackets.

    Raises: RecipeError when it does not look like that.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RecipeError(f"--coordinator: expected HOST:PORT, got `{address}`")
    return host.strip("[]"), int(port)


def _listen(address: str, count: int) -> socket.socket:
    host, port = split_address(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=count)  # pyright: ignore
    except OSError as error:
        hints = {
            errno.EADDRINUSE: "is process 0 started twice? else choose another port",
            errno.EADDRNOTAVAIL: "the address must be one of the machine of process 0",
        }
        number = error.errno or 0
        # Names that cannot be resolved have numbers below 0; `create_server` adds the address.
        reason = os.strerror(number) if number > 0 else error.strerror
        raise RecipeError(
            f"process 0 cannot listen on {address}: {reason}", hint=hints.get(number)
        ) from error


def _connect(address: str, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection(split_address(address), timeout=max(left, 0.1))
        except OSError as error:
            if left <= 0:
                raise HostError(
                    f"process 0 did not answer at {address} within {seconds:g} s: "
                    f"{error.strerror or error}",
                    hint="is it started, and is this its address?",
                ) from error
        time.sleep(min(RETRY_SECONDS, max(left, 0)))


def _receive_all(address: str, server: socket.socket, count: int, seconds: float) -> Wire:
    """In process 0: waits for the others."""
    deadline = time.monotonic() + seconds
    lines: dict[int, Line] = {}
    names = {0: f"process 0 ({socket.gethostname()})"}
    with server:
        while len(names) < count or _forget_gone(names, lines):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                missing = [f"process {index}" for index in range(count) if index not in names]
                _refuse_all(
                    lines,
                    HostError(
                        f"{_listed(missing)} of {count} did not come to {address} within "
                        f"{seconds:g} s",
                        hint="start them with the same command; "
                        "`runtime.join_seconds` says how long to wait",
                    ),
                )
            sock.settimeout(HELLO_SECONDS)
            _admit(sock, count, names, lines)
    ordered = [names[index] for index in range(count)]
    for line in lines.values():
        line.send({"names": ordered})
    return Wire(0, ordered, lines)


def _admit(sock: socket.socket, count: int, names: dict[int, str], lines: dict[int, Line]) -> None:
    """Takes in who has just connected, unless it is no process of this run."""
    try:
        hello = json.loads(sock.recv(4096))
        index, of, host = int(hello["process"]), int(hello["of"]), str(hello["host"])
    except (OSError, ValueError, KeyError, TypeError):
        sock.close()  # somebody who looks for open ports
        return
    line = Line(sock)
    lines_and_it = {**lines, index: line}
    if of != count:
        what = f"process {index} on {host} was started as one of {of}, process 0 as one of {count}"
        _refuse_all(lines_and_it, RecipeError(what, hint="--num-processes must be the same"))
    if index in names:
        _forget_gone(names, lines)  # it may have been started anew
    if index in names or not 0 <= index < count:
        what = f"process {index} came twice: from {host} and as {names.get(index)}"
        _refuse_all({**lines, -1: line}, RecipeError(what, hint="every --process-id is used once"))
    names[index], lines[index] = f"process {index} ({host})", line


def _forget_gone(names: dict[int, str], lines: dict[int, Line]) -> bool:
    """Whether some of those who came have left again."""
    gone = [index for index, line in lines.items() if line.is_gone()]
    for index in gone:
        lines.pop(index).close()
        del names[index]
    return bool(gone)


def _refuse_all(lines: dict[int, Line], error: GlamError) -> None:
    for line in lines.values():
        line.send({"refused": error.what, "hint": error.hint, "code": error.exit_code})
        line.close()
    raise error


def _listed(names: list[str], limit: int = 8) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
