"""Google's `gcloud` command: the few calls that a launch makes, and its errors as advice."""

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from glamcli.errors import CloudError
from glamcli.launch.decisions import SlicePhase, phase
from glamcli.launch.meaning import NoLogin, NotThere, TryAgain, meaning
from glamcli.launch.record import Launch
from glamcli.untrusted import parse_json, read_file

CALL_SECONDS = 120.0
MAX_ANSWER_BYTES = 1 << 24
LABEL = "glam"
"""of a slice's machines: whose launch they are of."""
WAIT_HOURS = 24
"""for how long a request is good: nobody may be there any more when it is met."""


@dataclass(frozen=True)
class Slice:
    """What Google says of a slice: `words` for a person, the number of its workers, when its
    machines were created (seconds since 1970; None before), and whose it is (its label)."""

    phase: SlicePhase
    words: str
    num_workers: int = 0
    created: float | None = None
    label: str | None = None


_INSTALL = "https://cloud.google.com/sdk/docs/install says how"


def create_words(launch: Launch) -> list[str]:
    """The words after `gcloud compute tpus` that ask for a launch's slice."""
    words = ["queued-resources", "create", launch.name, f"--node-id={launch.name}"]
    words += [f"--accelerator-type={launch.accelerator}", f"--runtime-version={launch.image}"]
    words += [f"--valid-until-duration={WAIT_HOURS}h", f"--labels={LABEL}={launch.id}"]
    return words + ["--spot"] * launch.spot


def place_words(zone: str, project: str | None) -> list[str]:
    """The words that say where a slice is."""
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


def delete_commands(name: str, zone: str, project: str | None) -> str:
    """What a person can do about a slice."""
    place = shlex.join(place_words(zone, project))
    return (
        f"gcloud compute tpus queued-resources delete {name} {place} --force; where there is no "
        f"such request: gcloud compute tpus tpu-vm delete {name} {place}"
    )


def default_project() -> str:
    """Raises: CloudError when gcloud has none."""
    found = _run(("config", "get", "project", "--quiet"), "", "looking for a project").strip()
    if not found:
        raise meaning("property [core/project]", "", "looking for a project")
    return found


@dataclass(frozen=True)
class BucketPlace:
    """Where a bucket is: `US-CENTRAL2`, `US` for several regions; these where one chose them."""

    name: str
    regions: tuple[str, ...] = ()


def bucket_place(bucket: str) -> BucketPlace:
    """Raises: CloudError when Google does not say."""
    words = ("storage", "buckets", "describe", f"gs://{bucket}", "--format=json", "--raw")
    found = _json(_run((*words, "--quiet"), "", f"describing gs://{bucket}"))
    if not isinstance(found, dict) or not isinstance(found.get("location"), str):
        raise CloudError(f"gcloud does not say where gs://{bucket} is")
    chosen = (found.get("customPlacementConfig") or {}).get("dataLocations") or ()
    return BucketPlace(found["location"], tuple(map(str, chosen)))


class Gcloud:
    """Calls in one zone of one project (None is gcloud's own default)."""

    def __init__(self, zone: str, project: str | None):
        self.zone = zone
        self._place = place_words(zone, project)
        self.ssh_error = ""
        """what gcloud said when the last `ssh` failed somewhere."""

    def check(self) -> None:
        """Raises: CloudError when gcloud is not installed, or not logged in."""
        words = ("auth", "list", "--filter=status:ACTIVE", "--format=json", "--quiet")
        if not _json(_run(words, self.zone, "looking for a login")):
            raise NoLogin("gcloud is not logged in", "gcloud auth login")

    def create(self, launch: Launch, held: IO[str]) -> None:
        """Asks for a slice; `held` stays open in gcloud, so that its lock outlives this process."""
        self._call(*create_words(launch), name=launch.name, held=held)

    def delete(self, name: str) -> None:
        """Asks to delete a slice, whatever state it is in; nothing where there is none."""
        try:
            self._call("queued-resources", "delete", name, "--force", "--async", name=name)
        except NotThere:  # machines may be there without a request
            with contextlib.suppress(NotThere):
                self._call("tpu-vm", "delete", name, "--async", name=name)

    def find(self, name: str) -> Slice:
        """The slice of that name, which may be absent."""
        request = self._describe("queued-resources", name)
        node = self._describe("tpu-vm", name)
        state = (request.get("state") or {}) if request is not None else {}
        now, vm = state.get("state"), (node or {}).get("state")
        if node is not None:
            vm = vm or "CREATING"
        if request is not None:
            now = now or "CREATING"
        words = now or ("no request" if vm else "")
        words += f", its machines {vm}" if vm and (vm != "READY" or not now) else ""
        if now == "FAILED":
            reason = ((state.get("failedData") or {}).get("error") or {}).get("message")
            words += f" ({reason})" if reason else ""
        workers = len((node or {}).get("networkEndpoints") or [])
        created = _seconds((node or {}).get("createTime"))
        return Slice(phase(now, vm), words, workers, created, _label(node, request))

    def ssh(self, name: str, command: str, seconds: float) -> dict[int, str]:
        """What the command printed on each worker that could be reached, by number."""
        with tempfile.TemporaryDirectory(prefix="glam-ssh-") as folder:
            words = ("--worker=all", f"--command={command}", f"--output-directory={folder}")
            self.ssh_error = ""
            # There gcloud 528 loses the path of the folder: it writes to `None/0.log`.
            Path(folder, "None").mkdir()
            try:
                how = {"seconds": seconds, "cwd": folder}
                self._call("tpu-vm", "ssh", name, *words, name=name, **how)
            except NotThere as error:
                raise TryAgain(error.what) from error  # it has just gone
            except TryAgain as error:  # also when the command failed on one worker only
                self.ssh_error = error.what
            logs = {int(each.stem): each for each in Path(folder).rglob("*.log")}
            said = {worker: _text(log) for worker, log in sorted(logs.items())}
        return {worker: text for worker, text in said.items() if text}

    def scp(self, name: str, source: Path, target: str, seconds: float) -> None:
        """Copies a folder to `target` in the home folder of every worker."""
        words = (str(source), f"{name}:{target}", "--recurse", "--worker=all")
        self._call("tpu-vm", "scp", *words, name=name, seconds=seconds)

    def _describe(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            found = _json(self._call(kind, "describe", name, "--format=json", name=name))
        except NotThere:
            return None
        if not isinstance(found, dict):
            raise TryAgain(f"describing {name}: gcloud answered something else than an object")
        return found

    def _call(self, *words: str, **how: Any) -> str:
        full = ("compute", "tpus", *words, *self._place, "--quiet")
        return _run(full, self.zone, " ".join(words[:3]), **how)


def _run(
    words: Sequence[str],
    zone: str,
    doing: str,
    name: str = "",
    seconds: float = CALL_SECONDS,
    held: IO[str] | None = None,
    cwd: str | None = None,
) -> str:
    """The standard output of a call. Raises: CloudError by what it says when it fails."""
    try:
        done = subprocess.run(
            ["gcloud", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            cwd=cwd,
            pass_fds=() if held is None else (held.fileno(),),
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        )
    except FileNotFoundError:
        raise CloudError("the command `gcloud` is not installed", _INSTALL) from None
    except subprocess.TimeoutExpired:
        raise TryAgain(f"{doing}: gcloud did not answer in {seconds:.0f} seconds") from None
    except OSError as error:
        raise CloudError(f"cannot run gcloud: {error.strerror or error}", _INSTALL) from error
    if done.returncode:
        raise meaning(done.stderr or done.stdout, zone, doing, name)
    return done.stdout


def _json(text: str) -> Any:
    try:
        return parse_json(text or "null")
    except ValueError as error:
        raise TryAgain(f"gcloud answered what is not JSON: {error}") from error


def _label(node: dict[str, Any] | None, request: dict[str, Any] | None) -> str | None:
    """Whose slice it is, by its machines or by the request for them."""
    specs = ((request or {}).get("tpu") or {}).get("nodeSpec") or [{}]
    for each in (node, specs[0].get("node")):
        if found := ((each or {}).get("labels") or {}).get(LABEL):
            return found
    return None


def _text(log: Path) -> str:
    return read_file(log, MAX_ANSWER_BYTES).decode(errors="replace")


def _seconds(time: str | None) -> float | None:
    try:
        return datetime.fromisoformat(time or "").timestamp()
    except ValueError:
        return None
