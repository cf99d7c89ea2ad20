"""How the processes of a run meet: where, given by options or a cluster, and the first greeting.

Process 0 listens on the coordinator's address until everybody has come, and then leaves the port to
`jax.distributed`; the connections stay open (`wire.py`).
"""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from jax._src.clusters import ClusterEnv

from glamcli.errors import GlamError, HostError, RecipeError, first_of
from glamcli.hosts.wire import Connection, Wire

HELLO_SECONDS = 5.0
RETRY_SECONDS = 0.2
SHOWN = 8
"""missing processes that an error names."""

# Of the clusters jax detects, those that start several processes to work together; in Kubernetes
# most programs are alone.
CLUSTERS = {"slurm": "Slurm", "ompi": "Open MPI", "gcetpu": "the TPU VM", "gketpu": "the TPU pod"}


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a run meet, and which one this is."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """devices of this machine that belong to this process; None is all of them."""
    listen: str | None = None
    """where process 0 listens; None is at `coordinator`, and nowhere else."""


def given_rendezvous(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Rendezvous | None:
    """The rendezvous of the three options, which belong together; None without any.

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
    return Rendezvous(coordinator, num_processes, process_id)


def detected_rendezvous(seconds: float) -> Rendezvous | None:
    """That of the TPU pod, Slurm or Open MPI around this process; None when it is the only one.

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
    return Rendezvous(address, count, index, None if device is None else (device,), listen)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 host stands in brackets.

    Raises: RecipeError when it does not look like that.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RecipeError(f"--coordinator: expected HOST:PORT, got `{address}`")
    return host.strip("[]"), int(port)


def meet(address: str, listen: str, index: int, count: int, seconds: float) -> Wire:
    """The wire of process `index` of `count`, once all of them have connected to `address`; process
    0 listens at `listen`.

    Raises:
        RecipeError: the address cannot be used, or the processes were started differently.
        HostError: some did not connect within `seconds`; it names them.
    """
    if index == 0:
        return _receive_all(address, _listen(listen, count), count, seconds)
    connection = Connection(_connect(address, seconds))
    connection.send({"glam": 1, "process": index, "of": count, "host": socket.gethostname()})
    answer = connection.receive() or {}
    if "names" in answer:
        return Wire(index, answer["names"], {0: connection})
    connection.close()
    if "refused" in answer:
        kind = RecipeError if answer["code"] == RecipeError.exit_code else HostError
        raise kind(answer["refused"], hint=answer["hint"])
    raise HostError(
        f"{address} closed the connection before the processes had agreed",
        hint="did process 0 end, or does another program listen there?",
    )


def _listen(address: str, count: int) -> socket.socket:
    host, port = split_address(address)
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(resolved[:2], family=family, backlog=count)  # pyright: ignore
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
        left = max(deadline - time.monotonic(), 0.0)
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


def _receive_all(address: str, server: socket.socket, count: int, seconds: float) -> Wire:
    """In process 0: waits for the others."""
    deadline = time.monotonic() + seconds
    connections: dict[int, Connection] = {}
    with server:
        while len(connections) < count - 1 or _forget_gone(connections):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                missing = [f"process {k}" for k in range(1, count) if k not in connections]
                missing = ", ".join(first_of(missing, SHOWN))
                what = f"{missing} of {count} did not come to {address}"
                hint = "start them with the same command, or raise `runtime.join_seconds`"
                _refuse_all(connections, HostError(f"{what} within {seconds:g} s", hint=hint))
            sock.settimeout(HELLO_SECONDS)
            _admit(sock, count, connections)
    names = [f"process 0 ({socket.gethostname()})", *(connections[k].name for k in range(1, count))]
    for connection in connections.values():
        connection.send({"names": names})
    return Wire(0, names, connections)


def _admit(sock: socket.socket, count: int, connections: dict[int, Connection]) -> None:
    """Adds the process that has just connected, unless it is none of this run."""
    try:
        hello = json.loads(sock.recv(4096))
        index, of, host = int(hello["process"]), int(hello["of"]), str(hello["host"])
    except (OSError, ValueError, KeyError, TypeError):
        sock.close()  # a port scanner, say
        return
    connection = Connection(sock, f"process {index} ({host})")
    if of != count:
        what = f"process {index} on {host} was started as one of {of}, process 0 as one of {count}"
        refused = RecipeError(what, hint="--num-processes must be the same")
        _refuse_all({**connections, index: connection}, refused)
    if index in connections:
        _forget_gone(connections)  # it may have been restarted
    if index in connections or not 0 < index < count:
        other = connections[index].name if index in connections else "process 0"
        what = f"process {index} came twice: from {host} and as {other}"
        refused = RecipeError(what, hint="every --process-id is used once")
        _refuse_all({**connections, -1: connection}, refused)
    connections[index] = connection


def _forget_gone(connections: dict[int, Connection]) -> bool:
    """Whether processes that had connected are gone again; they are removed."""
    gone = [index for index, connection in connections.items() if connection.is_gone()]
    for index in gone:
        connections.pop(index).close()
    return bool(gone)


def _refuse_all(connections: dict[int, Connection], error: GlamError) -> None:
    for connection in connections.values():
        connection.send({"refused": error.what, "hint": error.hint, "code": error.exit_code})
        connection.close()
    raise error
