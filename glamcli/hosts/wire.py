"""One TCP connection from every process of a run to process 0, for as long as the run lives: it
tells at once who died and why, and carries small values between all (docs/decisions/0008).

A message is one JSON object per line. Nothing is authenticated: the address belongs in a private
network, as that of `jax.distributed` does.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from glamcli.errors import HostError

# When a run hangs, all processes should end by their own watchdogs, which show their stacks; one
# that ends first must not take the others along before that.
GONE_SECONDS = 10.0
# A machine that lost power or network sends nothing, so the kernel probes it.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}

Message = dict[str, Any]


class Connection:
    """Messages over one connection; several threads may send."""

    def __init__(self, sock: socket.socket, name: str = ""):
        self.name = name
        """of the process at the other end."""
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.socket = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Sends, unless the other side is gone; the thread that receives notices that."""
        with self._lock, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None when the other side is gone or sends something else."""
        try:
            message = json.loads(self._file.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def is_gone(self) -> bool:
        """Whether the other side, from which no message is expected, has closed the connection."""
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
    """The connections of this process: to all others in process 0, to process 0 in the others."""

    def __init__(self, index: int, names: list[str], connections: dict[int, Connection]):
        self.index = index
        self.names = names
        """`process 1 (its machine)` of every process."""
        self.connections = connections
        self._changed = threading.Condition()
        self._values: dict[str, dict[int, Any]] = {}
        """of every gathering under way, by process."""
        self._num_gathered = 0
        self._closing = False
        self._over = False
        self._threads = [
            threading.Thread(target=self._read, args=(peer, connection), name=f"wire {peer}")
            for peer, connection in connections.items()
        ]

    def start(self, ended: Callable[[str, str | None, int], None]) -> None:
        """Begins to listen to the others.

        `ended(what, hint, code)` is called once, by a thread of its own, when another process
        failed (`what` contains its error) or is gone.
        """
        self._ended = ended
        for thread in self._threads:
            thread.start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values (for JSON) of all processes, in their order, once all have called this."""
        key = f"{self._num_gathered} {name}"
        self._num_gathered += 1
        if self.index:
            self._send_all({"put": key, "value": value})
        else:
            self._add(key, {0: value})
        with self._changed:
            self._changed.wait_for(lambda: len(self._values.get(key, ())) == len(self.names))
            values = self._values.pop(key)
        ordered = [values[index] for index in range(len(self.names))]
        if self.index == 0:
            self._send_all({"all": key, "values": ordered})
        return ordered

    def fail(self, what: str, hint: str | None, code: int) -> None:
        """Tells all others that this process failed and why."""
        with self._changed:
            self._closing = True  # the others leave because of this
        self._send_all({"failed": self.index, "what": what, "hint": hint, "code": code})

    def close(self, first: Callable[[], object]) -> None:
        """Closes the connections once every process has called this, after calling `first`."""
        self.gather("close", None)
        with self._changed:
            self._closing = True
        self.gather("closing", None)  # from here on, a closed one is not an error
        first()
        self._send_all({"bye": self.index})
        self._close_all()

    def _close_all(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for connection in self.connections.values():
            connection.close()

    def _read(self, peer: int, connection: Connection) -> None:
        while (message := connection.receive()) is not None:
            if "put" in message:
                self._add(message["put"], {peer: message["value"]})
            elif "all" in message:
                self._add(message["all"], dict(enumerate(message["values"])))
            elif "failed" in message:
                self._end(message)
            elif "bye" in message:
                return
        if self.index == 0 and not self._closing:
            time.sleep(GONE_SECONDS)
        self._end({"failed": peer, "what": None, "hint": None, "code": HostError.exit_code})

    def _add(self, key: str, values: dict[int, Any]) -> None:
        with self._changed:
            self._values.setdefault(key, {}).update(values)
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
            hint = "see the last lines of its output; rerun the same command on every machine"
        else:
            what, hint = f"{name} failed: {message['what']}", message["hint"]
        self._ended(what, hint, message["code"])

    def _send_all(self, message: Message) -> None:
        for connection in self.connections.values():
            connection.send(message)
