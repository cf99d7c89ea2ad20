"""Options that several commands have, worded once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from glamcli.config.files import run_folder
from glamcli.storage import is_url, place

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the recipe (batch.rows=16).",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Stop at a damaged checkpoint (exit 4) instead of taking the newest that is not.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


Address = tuple[str | None, int | None, int | None]
"""`--coordinator`, `--num-processes` and `--process-id`, as given."""


class FileOrUrl(click.Path):
    """A file or folder, local or behind a URL."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return place(str(value)) if is_url(value) else super().convert(value, param, ctx)


class RunFolder(click.Path):
    """The folder or URL (`gs://`, `s3://`) of a run, or of one of its checkpoints."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Raises: RecipeError for a URL where no run can be."""
        folder = run_folder(value)
        return folder if is_url(folder) else super().convert(folder, param, ctx)


run_argument = click.argument("run", type=RunFolder())


def hosts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where several processes of one run meet, passed on as `address`."""

    @click.option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Several processes: where process 0 listens. Detected automatically on a TPU pod, "
        "under Slurm and under Open MPI.",
    )
    @click.option("--num-processes", type=click.IntRange(1), help="Number of processes.")
    @click.option("--process-id", type=click.IntRange(0), help="Number of this process, from 0.")
    @functools.wraps(command)
    def with_address(
        coordinator: str | None, num_processes: int | None, process_id: int | None, **options: Any
    ) -> Any:
        return command(address=(coordinator, num_processes, process_id), **options)

    return with_address
