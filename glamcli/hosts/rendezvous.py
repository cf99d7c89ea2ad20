"""Where the processes of a run meet, and which one this is: from the options, or from a cluster."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from jax._src.clusters import ClusterEnv

from glamcli.errors import RecipeError

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
