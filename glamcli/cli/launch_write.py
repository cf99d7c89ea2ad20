"""`glam launch --write`: a file for whoever looks after the run instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.errors import RecipeError, first_of
from glamcli.storage import is_url

if TYPE_CHECKING:
    from glamcli.config.load import Loaded
    from glamcli.launch.record import Launch
    from glamcli.launch.written.slurm import Nodes
    from glamcli.plan.topology import Target


def nodes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a job of Slurm asks for instead of a slice."""
    add_gpus = click.option(
        "--gpus",
        type=click.IntRange(0),
        default=0,
        help="With `--write slurm`: GPUs of each machine, a process for each.",
    )
    add_nodes = click.option(
        "--nodes", type=click.IntRange(1), help="With `--write slurm`: machines.  [default: 1]"
    )
    return add_nodes(add_gpus(command))


def check_options(kind: str | None, tpu: str | None, zone: str | None, nodes: int | None) -> None:
    """Raises: RecipeError where a slice, or the machines of Slurm, are asked for by the other's
    options."""
    if kind != "slurm" and nodes is not None:
        raise RecipeError("--nodes is for `--write slurm`; the name of a slice says how many")
    if kind == "slurm" and (tpu or zone):
        raise RecipeError("--write slurm: a cluster has no slices", "give `--nodes` and `--gpus`")
    if kind != "slurm" and not (tpu and zone):
        missing = "--zone" if tpu else "--tpu"
        raise RecipeError(f"{missing} is missing", "for example `--tpu v4-32 --zone us-central2-b`")


def warn_of_files(loaded: Loaded, what: str) -> None:
    """Of those on this machine that the recipe reads: nothing sends them."""
    from glamcli.launch.package import local_paths

    if local := local_paths(loaded):
        files = ", ".join(first_of(local, 3))
        what = f"every machine of the {what} needs the same files as this one: {files}"
        render.make_progress().warn(what)


def write_slurm(
    loaded: Loaded, name: str | None, run: str, setup: str | None, number: int, gpus: int
) -> int:
    """A job of Slurm."""
    from glamcli.launch.record import Launch
    from glamcli.launch.request import check_name, check_nodes, launch_name
    from glamcli.launch.written.slurm import Nodes

    if is_url(run):
        raise RecipeError(f"--run {run}: the job needs it in a folder that all nodes share")
    nodes = Nodes(number, gpus)
    check_nodes(loaded, nodes)
    launch = Launch(check_name(name or launch_name(run)), "nodes", "", None, run=run)
    return write_files("slurm", loaded, launch, setup, nodes)


def write_files(
    kind: str, loaded: Loaded, asked: Launch, setup: str | None, on: Target | Nodes
) -> int:
    """The file, and the package that it sends, in a folder of the launch's name."""
    from glamcli.launch.written import write_job

    if kind == "gke" and setup is not None:
        raise RecipeError("--setup is for machines; a pod's volumes are in the file")
    warn_of_files(loaded, "job")
    path, command = write_job(kind, Path(asked.name), loaded, asked, setup, on)
    click.echo(f"wrote {path} and what it sends; read it, then `{command}`")
    return 0
