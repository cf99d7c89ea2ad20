"""`glam launch`: train a recipe on a TPU slice that is asked for, looked after and given back.

`glam launch RECIPE` is short for `glam launch start RECIPE`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.launch_show import (
    cost_words,
    list_,
    logs,
    name_argument,
    status,
    stopped_by_url,
    unknown,
)
from glamcli.cli.launch_write import (
    check_options,
    nodes_options,
    warn_of_files,
    write_files,
    write_slurm,
)
from glamcli.cli.options import RunFolder, set_option
from glamcli.config.files import is_path, shipped
from glamcli.config.load import load_recipe
from glamcli.config.nearest import nearest
from glamcli.errors import LaunchError, printable
from glamcli.storage import is_url

if TYPE_CHECKING:
    from glamcli.config.load import Loaded
    from glamcli.launch.control import Control
    from glamcli.launch.record import Launch, Record


_PROJECT = click.option("--project", help="Google Cloud project.  [default: that of gcloud]")


class _RecipeOrCommand(click.Group):
    """The first word is a subcommand, or else what `start` takes.

    Its help is that of `start`, the usual meaning of `glam launch`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            is_recipe = is_path(args[0]) or args[0] in shipped("recipes")
            if is_recipe or not nearest(args[0], self.commands):
                args = ["start", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] RECIPE | COMMAND ...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["start"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_RecipeOrCommand)
def command() -> None:
    """Train RECIPE on a TPU slice of Google Cloud, to its end.

    Asks for the slice, installs this very version of glam on its machines, starts `glam train` on
    all of them, shows what the first one prints, starts it again after a failure that may pass,
    asks for another slice when this one is taken away, and gives the slice back when the run has
    ended. Ctrl-C leaves the slice running, and the same command looks after it again. Needs
    `gcloud`, logged in. docs/tpu.md goes through all of it.
    """


for subcommand in (status, logs, list_):
    command.add_command(subcommand)


@command.command()
@click.argument("recipe")
@set_option
@click.option("--tpu", metavar="NAME", help="The slice: v4-32, v5e-64, ...")
@click.option("--zone", help="Where: us-central2-b, ...")
@click.option(
    "--run",
    "run_dir",
    type=RunFolder(file_okay=False),
    required=True,
    help="Folder of the run: gs://bucket/run, or one that all machines of the slice mount.",
)
@click.option("--spot", is_flag=True, help="A cheaper slice that may be taken away at any time.")
@click.option("--name", help="Name of slice and launch.  [default: glam-<last part of the run>]")
@_PROJECT
@click.option(
    "--setup",
    metavar="COMMAND",
    help="Shell command for every machine before glam is installed: mount the run's folder, ...",
)
@click.option("--keep", is_flag=True, help="Leave the slice, which costs money, after the end.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and end.")
@click.option(
    "--write",
    "kind",
    type=click.Choice(["script", "sky", "slurm", "gke"]),
    help="Write a shell script, or a job for SkyPilot, Slurm or Kubernetes, into ./NAME instead.",
)
@nodes_options
def start(
    recipe: str,
    sets: tuple[str, ...],
    tpu: str | None,
    zone: str | None,
    run_dir: Path,
    spot: bool,
    name: str | None,
    project: str | None,
    setup: str | None,
    keep: bool,
    dry_run: bool,
    kind: str | None,
    nodes: int | None,
    gpus: int,
) -> int:
    """Train RECIPE on a slice."""
    loaded = load_recipe(recipe, sets)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice's shape is arithmetic

    from glamcli.launch import ending, request
    from glamcli.launch.control import Control
    from glamcli.launch.egress import egress_warning
    from glamcli.launch.gcloud import Gcloud, default_project
    from glamcli.launch.in_bucket import launch_folder
    from glamcli.launch.record import Record

    run = request.check_run(str(run_dir))
    check_options(kind, tpu, zone, nodes)
    if kind == "slurm":
        return write_slurm(loaded, name, run, setup, nodes or 1, gpus)
    target, shape = request.check_target(loaded, tpu or "")
    where: dict[str, Any] = {"zone": zone or "", "project": project, "spot": spot}
    asked = request.make_launch(loaded, target, name=name, run=run, setup=setup, kind=kind, **where)
    if kind is not None:
        return write_files(kind, loaded, asked, setup, target)
    Gcloud(asked.zone, project).check()
    asked.project = project or default_project()
    cloud, record = Gcloud(asked.zone, asked.project), Record(asked.name)
    progress = render.make_progress()
    sizes = " x ".join(f"{axis} {n}" for axis, n in shape.items() if n > 1) or "one device"
    progress.say(f"{loaded.name} on {target.words}, {'spot, ' * spot}in {zone}; mesh {sizes}")
    progress.say(_price(asked))
    warn_of_files(loaded, "slice")
    if folder := launch_folder(run):
        folder.check()
        if said := egress_warning(folder.url, asked.zone):
            progress.warn(said)
    with nullcontext() if dry_run else record.looking_after():
        known = request.going_on(record, asked, cloud)
        if dry_run:
            _say_plan(asked, known is not None)
            return 0
        launch = known or _begin(loaded, asked, record, setup)
        if known is not None:
            progress.say(f"going on with `{launch.name}`, start {launch.attempt}")
        show = _shower(record)
        return _look_after(Control(launch, record, cloud, progress, show, ending.PATIENCE, keep))


def _begin(loaded: Loaded, asked: Launch, record: Record, setup: str | None) -> Launch:
    from glamcli.launch.in_bucket import launch_folder
    from glamcli.launch.package import write_package

    record.begin()
    if (before := record.load()) is not None:
        before.closed()
        asked.spans = before.spans  # what slices of this name cost
    asked.digest = write_package(record.folder / "package", loaded, asked.run, setup)
    if folder := launch_folder(asked.run):
        folder.send(record.folder / "package")
    record.save(asked)
    return asked


def _look_after(control: Control) -> int:
    """Until the end, which is told with what it cost; the exit code."""
    from glamcli.launch.record import Stopped

    launch, progress = control.launch, control.progress
    stop = f"glam launch stop {launch.name}"
    try:
        code = control.run()
    except (KeyboardInterrupt, OSError):  # the latter of standard output
        progress.warn(
            f"nobody looks after `{launch.name}` now, and its slice goes on costing money"
        )
        progress.say(f"the same command looks after it again; `{stop}` ends it")
        raise
    except Stopped as error:
        progress.say(error.what)
        return 0
    except LaunchError:
        if not launch.gone:
            progress.warn(f"the slice may exist and cost money; `{stop}` ends it")
        raise
    progress.say(f"{launch.name}: {launch.ended}; step {launch.step}, {cost_words(launch)}")
    if launch.kept:
        progress.warn(f"the slice is kept and costs money; `{stop}` deletes it")
    return code


def _shower(record: Record) -> Callable[[str], None]:
    """Prints what worker 0 prints, and keeps it."""

    def show(text: str) -> None:
        with suppress(OSError), open(record.log, "a", encoding="utf-8") as file:
            file.write(text)
        click.echo(printable(text), nl=False)

    return show


def _price(launch: Launch) -> str:
    if launch.dollars_per_hour is None:
        return f"no price is known for {launch.target}"
    price = f"{launch.target} costs {launch.dollars_per_hour:,.2f} dollars per hour on demand"
    return f"{price} by list price{'; spot costs less' * launch.spot}"


def _say_plan(asked: Launch, goes_on: bool) -> None:
    from glamcli.launch.gcloud import create_words, place_words

    if goes_on:
        click.echo(f"would look after `{asked.name}` again, as it is")
        return
    words = ["gcloud", "compute", "tpus", *create_words(asked)]
    words += place_words(asked.zone, asked.project)
    click.echo(f"would ask for the slice:\n  {printable(shlex.join(words))}")
    train = shlex.join(["glam", "train", "recipe.yaml", "--run", asked.run])
    click.echo(f"would install this glam on its machines and start on all of them:\n  {train}")


@command.command()
@name_argument
@click.option("--zone", help="Where the slice is, if it was launched from another machine.")
@_PROJECT
def stop(name: str, zone: str | None, project: str | None) -> None:
    """Let the run save, then delete the slice."""
    from glamcli.launch import ending
    from glamcli.launch.gcloud import Gcloud, default_project
    from glamcli.launch.record import Launch, Record
    from glamcli.launch.request import check_name

    progress, elsewhere = render.make_progress(), False
    if is_url(name):
        record, launch, elsewhere = stopped_by_url(name)
        name = record.name
    else:
        record = Record(name)
        launch = record.load()
    if zone is not None and (launch is None or launch.gone):
        spans = launch.spans if launch else []
        project = project or default_project()
        launch = Launch(check_name(name), "a slice", zone, project, slices=1, spans=spans)
        record.save(launch)
    if launch is None:
        raise unknown(name, "`--zone ZONE` says where it is if it was launched elsewhere")
    if (zone or launch.zone, project or launch.project) != (launch.zone, launch.project):
        raise LaunchError(
            f"`{name}` was launched in zone {launch.zone} of project {launch.project}",
            f"`glam launch stop {name}` ends it there; only then `--zone` can name another slice",
        )
    cloud = Gcloud(launch.zone, launch.project)
    launch = ending.end_launch(record, launch, cloud, progress, ending.PATIENCE, elsewhere)
    progress.say(f"{name}: {launch.ended}; no slice is left; {cost_words(launch)}")
