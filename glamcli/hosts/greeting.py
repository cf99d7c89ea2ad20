"""How the processes of a run meet: each proves to process 0 that it knows the secret, and process 0
to each (`secret.py`).

Process 0 listens on the coordinator's address until everybody has come (`door.py`), and then leaves
the port to `jax.distributed`; the connections stay open (`wire.py`). It speaks first:

    process 0    {"glam": challenge}
    process k    {"process": k, "of": count, "host": ..., "reply": ..., "proof": ...}
    process 0    {"welcome": proof}, and once all are there {"names": [...]}
"""

import secrets
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from glamcli.errors import HostError, RecipeError
from glamcli.hosts.door import HELLO_BYTES, RETRY_SECONDS, Door
from glamcli.hosts.rendezvous import split_address
from glamcli.hosts.secret import SECRET_VARIABLE, is_equal, proof
from glamcli.hosts.wire import MESSAGE_BYTES, Connection, Wire

ANSWER_SECONDS = 10.0
"""what process 0 may take beyond its own time to say that others did not come."""


def meet(
    address: str,
    listen: str,
    index: int,
    count: int,
    seconds: float,
    secret: bytes,
    warn: Callable[[str], None],
) -> Wire:
    """The wire of process `index` of `count`, once all of them have connected to `address`; process
    0 listens at `listen` and warns of processes that have another secret.

    Raises:
        RecipeError: the address cannot be used, the processes were started differently, or process
            0 has another secret.
        HostError: some did not connect within `seconds`; it names them.
    """
    if index == 0:
        with Door(listen, count, secret, warn) as door:
            return door.receive_all(address, seconds)
    until = time.monotonic() + seconds
    while True:
        connection = Connection(_connect(address, seconds, until))
        with ExitStack() as stack:
            stack.callback(connection.close)
            if _introduce(connection, address, index, count, secret, until):
                names = _receive_names(connection, address, count, until + ANSWER_SECONDS)
                stack.pop_all()
                return Wire(index, names, {0: connection})
        time.sleep(RETRY_SECONDS)


def _connect(address: str, seconds: float, until: float) -> socket.socket:
    while True:
        left = max(until - time.monotonic(), 0.0)
        try:
            return socket.create_connection(split_address(address), timeout=max(left, 0.1))
        except OSError as error:
            if not left:
                raise HostError(
                    f"process 0 did not answer at {address} within {seconds:g} s: "
                    f"{error.strerror or error}",
                    hint="is it running, and is this its address?",
                ) from error
        time.sleep(min(RETRY_SECONDS, left))


def _introduce(
    connection: Connection, address: str, index: int, count: int, secret: bytes, until: float
) -> bool:
    """Shows process 0 this one's proof and looks at its own; False when it closed the connection
    before that, as it does when too many come at once."""
    host, reply = socket.gethostname(), secrets.token_hex(16)
    try:
        greeting = connection.receive(HELLO_BYTES, until)
        if greeting is None:
            return False
        challenge = str(greeting["glam"])
        mine = proof(secret, challenge, reply, index, f"hello {count} {host}")
        hello = {"process": index, "of": count, "host": host, "reply": reply, "proof": mine}
        connection.send(hello)
        welcome = connection.receive(HELLO_BYTES, until)
        if welcome is None:
            return False
        given = str(welcome["welcome"])
    except (ValueError, KeyError) as error:
        raise RecipeError(
            f"another program than glam answers at {address}",
            hint="--coordinator names a free port of the machine of process 0",
        ) from error
    except TimeoutError as error:
        raise HostError(
            f"what listens at {address} did not answer as process 0 of this run does",
            hint="does process 0 hang, or does another program listen there?",
        ) from error
    if not is_equal(given, proof(secret, challenge, reply, index, "welcome")):
        raise RecipeError(
            f"process 0 at {address} has another secret than process {index} on {host}",
            hint=f"start all with the same command and {SECRET_VARIABLE}; without that, the run "
            "folders need the same name",
        )
    return True


def _receive_names(connection: Connection, address: str, count: int, until: float) -> list[str]:
    """Names of all processes, once process 0 says that they have come."""
    with suppress(ValueError, TimeoutError):
        match connection.receive(MESSAGE_BYTES, until):
            case {"names": [*names]} if len(names) == count:
                connection.socket.settimeout(None)
                return [str(name) for name in names]
            case {"refused": what, "hint": hint, "code": code}:
                kind = RecipeError if code == RecipeError.exit_code else HostError
                raise kind(str(what), hint=hint)
    raise HostError(
        f"process 0 left {address} before the processes had agreed",
        hint="see the last lines of its output",
    )
