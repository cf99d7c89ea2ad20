"""`glam eval data`: the files that tasks read, made where that is possible, else explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import json_option
from glamcli.errors import DataError, GlamError, printable
from glamcli.evals.tasks.suites import SuiteFile, TaskFile, load_suite
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.evals.tasks.provision import Need

READY = "ready"


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
@click.option("--preset", default="glam", show_default=True, help="Whose conventions.")
@json_option
def data(
    suite: str,
    data_dir: Path | None,
    given: Path | None,
    offline: bool,
    preset: str,
    as_json: bool,
) -> int:
    """Make the data of TASK|SUITE ready, and say exactly what is missing and where it comes from.

    What is there is read as scoring would read it. What is missing is made from the authors'
    files below `--from`, else by TFDS where the network allows it. Ends with 3 while a task lacks
    anything; `glam eval` scores the others all the same.
    """
    from glamcli.evals.tasks.items import Library
    from glamcli.evals.tasks.provision import all_needs

    loaded = load_suite(suite, preset)
    progress = render.make_progress(as_json)
    library = Library(data_dir)
    found = all_needs(loaded.tasks, lambda file: library.folder(file.path))
    lacking = [each for _, of in found if not isinstance(of, GlamError) for each in of]
    _make(lacking, given, offline, progress)
    told = [_state(file, of, library.folder(file.path)) for file, of in found]
    _show(loaded, told, as_json)
    return 0 if all(each["state"] == READY for each in told) else DataError.exit_code


def _make(needs: list[Need], given: Path | None, offline: bool, progress: Progress) -> None:
    """Makes what can be made; what goes wrong is told and stops nothing else."""
    from glamcli.evals.tasks import provision

    if given is not None:
        missing = [each for each in needs if each.missing]
        with progress.phase("converting", len(missing), "files") as phase:
            for need in missing:
                phase.note(need.task)
                try:
                    for path, count in provision.convert(need, given):
                        progress.say(f"{path}: {count:,} records")
                except GlamError as error:
                    progress.warn(f"{error.what}" + (f" ({error.hint})" if error.hint else ""))
                phase.advance()
    wanted = [each for each in needs if each.missing and each.prepared is not None]
    if not wanted or offline:
        return
    if not provision.reachable("https://www.tensorflow.org/datasets"):
        progress.warn("there is no network: TFDS can download nothing")
        return
    tried: set[str] = set()
    with progress.phase("preparing through TFDS", len(wanted), "datasets") as phase:
        for need in wanted:
            phase.note(need.prepared or "")
            if need.prepared not in tried:
                tried.add(need.prepared or "")
                try:
                    provision.prepare(need)
                except GlamError as error:
                    progress.warn(error.what)
            phase.advance()


def _state(file: TaskFile, needs: list[Need] | GlamError, folder: Path) -> dict[str, Any]:
    """What a task has by now: counts, or what is wrong or missing."""
    from glamcli.evals.tasks import provision

    told: dict[str, Any] = {"task": file.name, "items": None, "demonstrations": None}
    if isinstance(needs, GlamError):
        return {**told, "state": "unreadable", "why": [needs.what]}
    if not needs:
        return {**told, "state": READY, "why": ["made from the run's own held-out documents"]}
    missing = [each for each in needs if each.missing]
    if missing:
        assert file.task is not None  # its needs are known
        present = {each.part: "there" for each in needs if not each.missing}
        why = provision.explained(file.task, missing)
        return {**told, **present, "state": "missing", "why": why}
    try:
        items, demonstrations = provision.check(file, folder)
    except GlamError as error:
        return {**told, "state": "bad", "why": [error.what]}
    return {**told, "items": items, "demonstrations": demonstrations, "state": READY, "why": []}


def _show(suite: SuiteFile, told: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for each in told:
            click.echo(json.dumps({"event": "data", **each}))
        return
    render.print_table(
        ("task", ">items", ">demonstrations", "state"),
        [
            [
                str(each["task"]),
                *("-" if each[part] is None else str(each[part]) for part in _PARTS),
                str(each["state"]),
            ]
            for each in told
        ],
        title=f"data of {suite.name}",
    )
    for each in told:
        if each["why"] and each["state"] != READY:
            click.echo(f"\n{each['task']}:")
            for line in each["why"]:
                click.echo(printable(f"  {line}"))


_PARTS = ("items", "demonstrations")
