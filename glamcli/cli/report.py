"""`glam report`: runs as one HTML page, also while they train."""

from __future__ import annotations

from pathlib import Path

import click

from glamcli.cli import render
from glamcli.cli.options import FileOrUrl, RunFolder
from glamcli.config.files import display
from glamcli.errors import GlamError, RecipeError, printable
from glamcli.storage import is_url
from glamcli.stored_runs import local

MAX_RUNS = 8


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=RunFolder())
@click.option(
    "-o",
    "--output",
    type=FileOrUrl(dir_okay=False),
    help="The page to write.  [default: report.html in the folder of the first RUN, or here where "
    "that is at a URL]",
)
def command(runs: tuple[Path, ...], output: Path | None) -> None:
    """Show RUN on one HTML page, or several runs side by side.

    Losses, routers, mixture, scores, speed and events of runs that are finished, stopped or
    training. The page holds everything it needs: it opens without a network and can be sent as it
    is. docs/report.md says how to read it.
    """
    if len(runs) > MAX_RUNS:
        raise RecipeError(f"{len(runs)} runs are more than a page can tell apart",
                          hint=f"give at most {MAX_RUNS}")  # fmt: skip
    from glamcli import atomic
    from glamcli.report.page import report_page
    from glamcli.report.run import read_run

    read = []
    with render.make_progress().phase("reading", len(runs), "runs") as phase:
        for run, name in zip(runs, _names(runs), strict=True):
            read.append(read_run(local(run, results=True), name))
            phase.advance()
    page = report_page(read)
    path = output or (Path() if is_url(runs[0]) else runs[0]) / "report.html"
    try:
        atomic.write(path, page)
    except OSError as error:
        raise GlamError(
            f"cannot write {path}: {error.strerror or error}", hint="name another file with `-o`"
        ) from error
    click.echo(printable(f"wrote {display(path)}"))


def _names(runs: tuple[Path, ...]) -> list[str]:
    """The names of the folders, or their paths where two have the same."""
    names = [run.absolute().name or str(run) for run in runs]
    return names if len({*names}) == len(names) else [str(run) for run in runs]
