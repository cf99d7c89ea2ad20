"""Options that several commands have, worded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the recipe (batch.rows=16).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


def hosts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where several processes of one run meet."""
    for option in reversed(
        (
            click.option(
                "--coordinator",
                metavar="HOST:PORT",
                help="Several processes: where process 0 listens. Found out by itself on a TPU "
                "pod, under Slurm and under Open MPI.",
            ),
            click.option("--num-processes", type=click.IntRange(1), help="How many there are."),
            click.option("--process-id", type=click.IntRange(0), help="Which one this is, from 0."),
        )
    ):
        command = option(command)
    return command
