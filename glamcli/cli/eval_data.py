"""`glam eval data`: the files that tasks read, made where that is possible, else explained."""

from __future__ import annotations

import json
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
    from glamcli.evals.tasks.items import Library
    from glamcli.evals.tasks.provision import READY, data_state, needs

    loaded = load_suite(suite, preset)
    progress = render.make_progress(as_json)
    folder_of = Library(data_dir).folder
    readable = [file for file in loaded.tasks if file.error is None]
    needed = [need for file in readable for need in needs(file, folder_of(file.path))]
    if given is not None:
        _convert([each for each in needed if each.missing], given, progress)
    if not offline:
        _prepare([each for each in needed if each.missing and each.prepared], progress)
    states = [data_state(file, folder_of(file.path)) for file in loaded.tasks]
    _show(loaded, states, as_json)
    return 0 if all(each["state"] == READY for each in states) else DataError.exit_code


def _convert(missing: list[Need], given: Path, progress: Progress) -> None:
    """Makes what the authors' files allow; a failure is reported and stops nothing else."""
    from glamcli.evals.tasks.provision import convert_originals

    with progress.phase("converting", len(missing), "files") as phase:
        for need in missing:
            phase.note(need.task)
            try:
                for path, count in convert_originals(need, given):
                    progress.say(f"{path}: {count:,} records")
            except GlamError as error:
                progress.warn(f"{error.what}" + (f" ({error.hint})" if error.hint else ""))
            phase.advance()


def _prepare(missing: list[Need], progress: Progress) -> None:
    """Lets TFDS download and prepare the rest, each dataset once."""
    from glamcli.evals.tasks.provision import is_reachable, prepare_with_tfds

    by_name = {need.prepared or "": need for need in missing}
    if not missing:
        return
    if not is_reachable("https://www.tensorflow.org/datasets"):
        progress.warn("there is no network: TFDS can download nothing")
        return
    with progress.phase("preparing through TFDS", len(by_name), "datasets") as phase:
        for name, need in by_name.items():
            phase.note(name)
            try:
                prepare_with_tfds(need)
            except GlamError as error:
                progress.warn(error.what)
            phase.advance()


def _show(suite: SuiteFile, states: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for each in states:
            click.echo(json.dumps({"event": "data", **each}))
        return
    parts = ("items", "demonstrations")
    render.print_table(
        ("task", *(f">{part}" for part in parts), "state"),
        [
            [
                str(each["task"]),
                *("-" if each[part] is None else str(each[part]) for part in parts),
                str(each["state"]),
            ]
            for each in states
        ],
        title=f"data of {suite.name}",
    )
    for each in states:
        if each["why"] and each["state"] != "ready":
            click.echo(f"\n{each['task']}:")
            for line in each["why"]:
                click.echo(printable(f"  {line}"))
