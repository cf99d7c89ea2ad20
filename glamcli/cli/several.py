"""A command as one process of several: it joins the others, and only the first one shows things."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from glamcli import hugepages
from glamcli.cli import render, streams
from glamcli.cli.main import complain
from glamcli.cli.options import Address
from glamcli.config.load import load_recipe
from glamcli.config.schema import Runtime
from glamcli.errors import GlamError
from glamcli.progress import Aside, Progress
from glamcli.stored_runs import local

if TYPE_CHECKING:
    from glamcli.hosts.join import Host


def prepare_process(run: Path) -> Runtime:
    """Applies a run's huge-page setting, which must precede jax; the run's settings of this kind.

    They are read from the run's recipe file, which needs no jax; a bare checkpoint gets the
    defaults.

    Raises: CheckpointError when it is at a URL where no run is, or that cannot be read.
    """
    folder = local(run, metrics=False)
    try:
        runtime = load_recipe(folder / "recipe.yaml", check=False).recipe.runtime
    except GlamError:
        runtime = Runtime()
    hugepages.apply(runtime.huge_pages == "auto")
    return runtime


@contextmanager
def one_of_several(
    address: Address, run: Path, runtime: Runtime, as_json: bool
) -> Iterator[tuple[Host, Progress]]:
    """This process among those of `run` (mostly the only one), and where its progress goes.

    Results of a process that is not the first are discarded; its messages about its own machine
    go to stderr.

    Raises:
        RecipeError: the options make no sense, or their address cannot be used.
        HostError: other processes did not come.
        PlanError: what was done with them took more memory than there is.
    """
    from glamcli.hosts.join import joined
    from glamcli.hosts.rendezvous import given_rendezvous
    from glamcli.hosts.secret import run_secret
    from glamcli.memory import explaining_memory

    rendezvous = given_rendezvous(*address)
    is_first = address[2] in (None, 0)
    progress = render.make_progress(as_json) if is_first else render.Plain(sys.stderr)
    with (
        joined(rendezvous, run_secret(run), runtime, progress, _tell) as host,
        explaining_memory(lambda: "use a larger device, or several processes (docs/hosts.md)"),
    ):
        if host.is_first:
            with redirect_stdout(streams.Output(sys.stdout)):  # `joined` may have replaced it
                yield host, render.make_progress(as_json)
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield host, Aside(render.Plain(sys.stderr), host.index)


def _tell(what: str, hint: str | None) -> None:
    from glamcli.hosts.signals import show_cursor

    show_cursor()
    complain(what, hint)
