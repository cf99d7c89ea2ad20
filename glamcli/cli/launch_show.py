"""`glam launch status`, `logs` and `list`: how launches are, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import json_option
from glamcli.config.nearest import did_you_mean
from glamcli.errors import CloudError, LaunchError, RecipeError, printable
from glamcli.storage import is_url

if TYPE_CHECKING:
    from glamcli.launch.gcloud import Gcloud
    from glamcli.launch.record import Launch, Record

name_argument = click.argument("name", metavar="NAME|RUN")
"""of a launch of this machine, or the gs:// URL of its run."""


@click.command()
@name_argument
@json_option
def status(name: str, as_json: bool) -> None:
    """Say how a launch and its slice are."""
    from glamcli.launch.decisions import SlicePhase
    from glamcli.launch.ending import NO_SLICE, seen
    from glamcli.launch.workers import SliceWorkers

    record, launch, cloud = _known(name)
    found = seen(None if is_url(name) else record, launch, cloud)
    told = SliceWorkers(launch, cloud).ask(0) if found.phase is SlicePhase.READY else {}
    if as_json:
        workers = {worker: each and each.code for worker, each in told.items()}
        render.emit("launch", **_values(launch, found.words), codes=workers)
        return
    how = launch.ended or ("is being stopped" if record.stopped else "goes on")
    click.echo(printable(f"{launch.name}: {how}; run {launch.run}; {cost_words(launch)}"))
    click.echo(printable(f"slice: {found.words or NO_SLICE}; start {launch.attempt}"))
    for worker, each in told.items():
        how = "nothing was started"
        if each is not None and each.attempt:
            code = "runs" if each.code is None else f"ended with {each.code}"
            how = f"start {each.attempt} {code}, newest step {each.step}"
        click.echo(f"worker {worker}: {how}")


def _known(name: str) -> tuple[Record, Launch, Gcloud]:
    from glamcli.launch.gcloud import Gcloud
    from glamcli.launch.record import Record

    if is_url(name):
        launch = by_url(name)
        return Record(launch.name), launch, Gcloud(launch.zone, launch.project)
    record = Record(name)
    if (launch := record.load()) is None:
        raise unknown(name, None)
    return record, launch, Gcloud(launch.zone, launch.project)


def by_url(run: str) -> Launch:
    """The launch of a run in a bucket. Raises: LaunchError when there is none."""
    from glamcli.launch.in_bucket import LaunchFolder
    from glamcli.launch.request import check_name, check_place, check_run

    folder = LaunchFolder(check_run(run.rstrip("/")))
    launch = folder.load()
    launch.run = run.rstrip("/")
    try:  # others may write there, and these become a path and words of commands
        check_name(launch.name)
        check_place(launch.zone, launch.project)
    except RecipeError as error:
        raise LaunchError(f"{folder.url}/launch.json: {error.what}") from error
    return launch


def stopped_by_url(run: str) -> tuple[Record, Launch, bool]:
    """The record here of the launch of a run in a bucket, and whether it was launched elsewhere.

    Raises: LaunchError, also when another launch of that name is known here.
    """
    from glamcli.launch.record import Record

    launch = by_url(run)
    record = Record(launch.name)
    known = record.load()
    if known is not None and known.id == launch.id:
        return record, known, False
    if known is not None and not known.gone:
        what = f"another launch called `{launch.name}` is known here, into {known.run}"
        raise LaunchError(what, f"glam launch stop {launch.name}")
    record.save(launch, shared=False)
    return record, launch, True


def unknown(name: str, hint: str | None) -> LaunchError:
    """The error for a launch that this machine knows nothing of, with the nearest one it knows."""
    from glamcli.launch.record import all_records

    names = [record.name for record in all_records()]
    what = f"nothing called `{name}` was launched from this machine"
    return LaunchError(what, did_you_mean(name, names, hint or "`glam launch list` lists them"))


def _values(launch: Launch, state: str) -> dict[str, Any]:
    keys = ("name", "target", "zone", "project", "run", "ended", "code", "attempt", "step")
    values = {key: getattr(launch, key) for key in keys}
    return values | {"slice": state, "hours": launch.hours, "dollars": launch.dollars}


@click.command()
@name_argument
@click.option("--worker", type=click.IntRange(0), help="The end of this machine's log instead.")
def logs(name: str, worker: int | None) -> None:
    """Print the log of the first machine so far, or the end of another one's."""
    from glamcli.launch.in_bucket import launch_folder
    from glamcli.launch.workers import LAST_LINES, SliceWorkers

    record, launch, cloud = _known(name)
    folder = launch_folder(launch.run)
    if folder is not None and is_url(name):
        click.echo(printable(folder.logs(worker or 0)), nl=False)
        return
    if worker is None:
        try:
            click.echo(printable(record.log.read_text(errors="replace")), nl=False)
        except OSError as error:
            raise LaunchError(f"no log of `{name}` yet: {error.strerror}") from error
        return
    try:
        told = SliceWorkers(launch, cloud).ask(LAST_LINES).get(worker)
    except CloudError:
        if folder is None:
            raise
        told = None
    if told is None and folder is None:
        raise LaunchError(f"worker {worker} of `{name}` does not answer, or was not started")
    text = told.text if told else folder.logs(worker) if folder else ""
    click.echo(printable(text), nl=False)


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List all launches from this machine, with the state of their slices and what they cost."""
    from glamcli.launch.ending import slice_words
    from glamcli.launch.record import all_records

    rows = []
    for record in all_records():
        try:
            launch = record.load()
        except LaunchError as error:
            render.make_progress().warn(f"{error.what}; {error.hint}")
            rows.append((record.name, "?", "unknown", "its record cannot be read", "?", "?"))
            continue
        if launch is None:
            continue
        try:
            state = slice_words(record, launch)
        except LaunchError as error:
            state = f"unknown: {error.what}"
        if as_json:
            render.emit("launch", **_values(launch, state))
        dollars = "-" if launch.dollars is None else f"{launch.dollars:,.2f}"
        how = launch.ended or "goes on"
        rows.append((launch.name, launch.target, state, how, f"{launch.hours:.2f}", dollars))
    if not as_json:
        note = "hours and dollars are about right: US list price on demand, as far as was seen"
        columns = ("launch", "of", "slice", "run", ">hours", ">dollars")
        render.print_table(columns, rows, note=note if rows else "nothing was launched from here")


def cost_words(launch: Launch) -> str:
    """Hours and dollars, by the list price on demand."""
    hours = f"{launch.hours:.2f} hours of {launch.target}"
    if launch.dollars is None:
        return hours
    return f"{hours}, about {launch.dollars:,.2f} dollars by US list price"
