"""A launch as a file for whoever looks after it instead: a shell script, or a job of a scheduler.

Each file stands beside the package that it sends, and is there to be read and changed.
"""

from pathlib import Path

from glamcli import atomic
from glamcli.config.load import Loaded
from glamcli.errors import LaunchError
from glamcli.launch.package import TPU, extras, write_package
from glamcli.launch.record import Launch
from glamcli.launch.written import gke, sky, slurm
from glamcli.launch.written.script import script
from glamcli.launch.written.slurm import Nodes
from glamcli.plan.topology import Target

FORMS = {
    "script": ("launch.sh", "bash launch.sh"),
    "sky": ("task.yaml", "sky jobs launch task.yaml"),
    "slurm": ("job.sbatch", "sbatch job.sbatch"),
    "gke": ("jobset.yaml", "kubectl apply -f jobset.yaml"),
}
"""the name of the file, and what is done with it."""


def write_job(
    kind: str, folder: Path, loaded: Loaded, launch: Launch, setup: str | None, on: Target | Nodes
) -> tuple[Path, str]:
    """Writes the file and the package into a new folder; the file's path, and what to do with it.

    Raises: LaunchError when there is such a folder, or it cannot be written.
    """
    name, command = FORMS[kind]
    if folder.exists():
        raise LaunchError(f"{folder} exists already", "delete it, or choose another `--name`")
    files = {name: _text(kind, folder, launch, on)}
    if kind == "gke":
        files["package/Dockerfile"] = gke.dockerfile(",".join(extras(loaded)))
        files["package/.dockerignore"] = gke.IGNORED
    chips = on.extras if isinstance(on, Nodes) else TPU
    write_package(folder / "package", loaded, launch.run, setup, chips)
    for each, text in files.items():
        try:
            atomic.write(folder / each, text)
        except OSError as error:
            raise LaunchError(
                f"{folder / each} cannot be written: {error.strerror or error}"
            ) from error
    return folder / name, f"cd {folder} && {command}"


def _text(kind: str, folder: Path, launch: Launch, on: Target | Nodes) -> str:
    if isinstance(on, Nodes):
        return slurm.job(launch, folder.absolute(), on)
    if kind == "gke":
        return gke.jobset(launch, on)
    return sky.task(launch) if kind == "sky" else script(launch)
