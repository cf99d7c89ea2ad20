"""`glam eval data`: the files that tasks read, made where that is possible, else explained."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import json_option
from glamcli.errors import DataError, GlamError, printable
from glamcli.evals.tasks.suites import SuiteFile, load_suite
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.evals.tasks.provision import Need


@click.command()
@click.argument("suite", metavar="TASK|SUITE")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder the files belong in.  [default: the user's cache for shipped tasks]",
)
@click.option(
    "--from",
    "given",
    type=click.Path(path_type=Path, exists=True),
    help="Folder (or file) with what the authors publish, unpacked.",
)
@click.option("--offline", is_flag=True, help="Do not ask TFDS to download anything.")
@click.option("--preset", default="glam", help="Conventions: glam, gpt3, ...")
@json_option
def data(
    suite: str,
    data_dir: Path | None,
    given: Path | None,
    offline: bool,
    preset: str,
    as_json: bool,
) -> int:
    """Prepare the data of TASK|SUITE, and list exactly what is missing and where to get it.

    Existing files are read as scoring would read them. Missing ones are made from the authors'
    files below `--from`, else by TFDS if there is a network. Exits with 3 while a task lacks
    anything; `glam eval` still scores the others.
    """
    from glamcli.evals.tasks import provision
    from glamcli.evals.tasks.items import Library

    loaded = load_suite(suite, preset)
    progress = render.make_progress(as_json)
    folder_of = Library(data_dir).folder
    readable = [file for file in loaded.tasks if file.error is None]
    needed = [need for file in readable for need in provision.needs(file, folder_of(file.path))]
    if given is not None:

        def convert(need: Need) -> None:
            for path, count in need.convert(given):
                progress.say(f"{path}: {count:,} records")

        missing = [(each.task, each) for each in needed if each.missing]
        _make_all("converting", "files", missing, convert, progress)
    by_name = {each.prepared: each for each in needed if each.missing and each.prepared}
    if by_name and not offline:
        if provision.is_reachable("https://www.tensorflow.org/datasets"):
            title = "preparing through TFDS"
            _make_all(title, "datasets", by_name.items(), provision.Need.prepare, progress)
        else:
            progress.warn("there is no network: TFDS can download nothing")
    states = [provision.data_state(file, folder_of(file.path)) for file in loaded.tasks]
    _show(loaded, states, as_json)
    return 0 if all(each["state"] == provision.READY for each in states) else DataError.exit_code


def _make_all(
    title: str,
    noun: str,
    needs: Collection[tuple[str, Need]],
    make: Callable[[Need], None],
    progress: Progress,
) -> None:
    """Makes what is missing, each shown by its name; a failure is reported and stops nothing."""
    with progress.phase(title, len(needs), noun) as phase:
        for name, need in needs:
            phase.note(name)
            try:
                make(need)
            except GlamError as error:
                progress.warn(f"{error.what}" + (f" ({error.hint})" if error.hint else ""))
            phase.advance()


def _show(suite: SuiteFile, states: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for each in states:
            render.emit("data", **each)
        return
    columns = ("task", "items", "demonstrations", "state")
    rows = [["-" if each[name] is None else str(each[name]) for name in columns] for each in states]
    render.print_table(
        ("task", ">items", ">demonstrations", "state"), rows, title=f"data of {suite.name}"
    )
    for each in states:
        if each["why"] and each["state"] != "ready":
            click.echo(printable(f"\n{each['task']}:"))
            for line in each["why"]:
                click.echo(printable(f"  {line}"))
