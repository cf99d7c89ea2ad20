"""What is asked for with `glam launch`, checked before anything costs money."""

import hashlib
import json
import re
import secrets
import shlex
from pathlib import Path

from glamcli.config.chips import load_chips
from glamcli.config.load import Loaded
from glamcli.config.sharding import check_divides, indivisible
from glamcli.errors import LaunchError, RecipeError
from glamcli.launch.decisions import SlicePhase
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.package import recipe_files
from glamcli.launch.record import Launch, Record
from glamcli.launch.slices import accelerator_type, image_of, slice_of
from glamcli.launch.written.slurm import Nodes
from glamcli.plan.planner import on_target
from glamcli.plan.topology import Target, parse_target
from glamcli.storage import is_url

_PLACE = re.compile(r"[a-z0-9][-a-z0-9.:]*")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


def launch_name(run: str) -> str:
    """The name of a launch by its run: `glam-` and the last part of the run's path."""
    last = re.sub(r"[^a-z0-9]+", "-", Path(run).name.lower()).strip("-")
    return f"glam-{last}"[:40].rstrip("-")


def check_name(name: str) -> str:
    """Raises: RecipeError when Google takes no slice of that name."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"`{name}` cannot be the name of a slice",
            "lower-case letters, digits and dashes, a letter first, at most 40",
        )
    return name


def check_place(zone: str, project: str | None) -> None:
    """Raises: RecipeError when these cannot be names of a zone and a project."""
    for option, value in (("zone", zone), ("project", project)):
        if value is not None and not _PLACE.fullmatch(value):
            example = "us-central2-b" if option == "zone" else "my-project"
            raise RecipeError(f"--{option} {value!r}: not the name of one", f"such as {example}")


def check_run(run: str) -> str:
    """Raises: RecipeError when the workers would not find it there, or not list its steps."""
    if not run.isprintable():
        raise RecipeError(f"--run {run!r}: not a path in one line")
    if is_url(run):
        if not run.startswith("gs://"):
            raise RecipeError(f"--run {run}: a bucket of Google's, gs://, or a mounted folder")
        return run
    if not Path(run).is_absolute():
        raise RecipeError(
            f"--run {run}: a relative path is another folder on every worker",
            "gs://BUCKET/NAME, or the absolute path of a folder that all workers mount",
        )
    return run


def check_target(loaded: Loaded, name: str) -> tuple[Target, dict[str, int]]:
    """The slice of that name, and the sizes of the recipe's mesh on it.

    Raises: RecipeError, PlanError when there is none, or the recipe cannot be laid out on it.
    """
    target, _ = slice_of(parse_target(name, load_chips()))
    with loaded.placing():
        recipe, shape = on_target(loaded.recipe, target)
        check_divides(indivisible(recipe, shape))
    return target, shape


def check_nodes(loaded: Loaded, nodes: Nodes) -> None:
    """Raises: RecipeError, PlanError when the recipe cannot be laid out on these machines."""
    on = Target(f"{nodes.num_devices} devices", "cpu", num_chips=nodes.num_devices)
    with loaded.placing():
        recipe, shape = on_target(loaded.recipe, on)
        check_divides(indivisible(recipe, shape))


def make_launch(
    loaded: Loaded,
    target: Target,
    *,
    name: str | None,
    run: str,
    zone: str,
    project: str | None,
    spot: bool,
    setup: str | None,
    kind: str | None = None,
) -> Launch:
    """The launch that is asked for, or written as a file of that kind; its package is not made yet.

    Raises: RecipeError when a name is none that Google takes; PlanError for a kind of chip that
        is not offered so.
    """
    name = check_name(name or launch_name(run))
    check_place(zone, project)
    _, chip = slice_of(target)
    accelerator = accelerator_type(target)
    asked = [recipe_files(loaded), run, setup, accelerator, zone, spot]
    return Launch(
        name=name,
        target=target.name,
        accelerator=accelerator,
        image="" if kind == "gke" else image_of(target),
        zone=zone,
        project=project,
        spot=spot,
        run=run,
        id=secrets.token_hex(4),
        request=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        digest="",
        dollars_per_hour=None if chip.price is None else chip.price * target.num_chips,
    )


def going_on(record: Record, asked: Launch, cloud: Gcloud) -> Launch | None:
    """The launch of that name that goes on, if it is what is asked for; None to begin a new one.

    Raises: LaunchError when the name is taken by another one, here or in the cloud.
    """
    known = record.load()
    if known is not None and not known.gone and record.stopped:
        what = f"`{asked.name}` was being stopped, which was not finished"
        raise LaunchError(what, f"glam launch stop {asked.name}")
    if known is not None and known.ended is not None and not known.gone and _is_left(known, asked):
        return known
    if known is not None and known.ended is None:
        if (known.request, known.project) != (asked.request, asked.project):
            raise LaunchError(
                f"`{asked.name}` is launched already, with another recipe, slice or run",
                f"choose another `--name`, or `glam launch stop {asked.name}` first",
            )
        return known
    if cloud.find(asked.name).phase is not SlicePhase.ABSENT:
        place = shlex.join(["--zone", asked.zone, "--project", asked.project or ""])
        raise LaunchError(
            f"there is a slice `{asked.name}` in {asked.zone} already, not of this launch",
            f"choose another `--name`, or `glam launch stop {asked.name} {place}`",
        )
    return None


def _is_left(known: Launch, asked: Launch) -> bool:
    """Whether a launch that has ended is the one asked for, and only its slice is to be deleted.

    Raises: LaunchError when it is not, and has left a slice.
    """
    same = (known.request, known.project) == (asked.request, asked.project)
    if same and not known.kept:
        return True
    if Gcloud(known.zone, known.project).find(known.name).phase is not SlicePhase.ABSENT:
        raise LaunchError(
            f"the slice of `{known.name}`, which has ended, is still in {known.zone}",
            f"`glam launch stop {known.name}` deletes it; or choose another `--name`",
        )
    return False
