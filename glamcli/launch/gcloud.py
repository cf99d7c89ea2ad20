"""Google's `gcloud` command: the few calls that a launch makes, and its errors as advice."""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from glamcli.errors import CloudError
from glamcli.launch.decisions import SlicePhase, phase
from glamcli.launch.record import Launch
from glamcli.untrusted import parse_json, read_file

CALL_SECONDS = 120.0
MAX_ANSWER_BYTES = 1 << 24


class NotThere(CloudError):
    """No such slice."""


class NameTaken(CloudError):
    """There is such a slice already."""


class TryAgain(CloudError):
    """What may be different later: no capacity, no quota, no connection."""


class Unclear(TryAgain):
    """Something that gcloud says, and is not known here."""


@dataclass(frozen=True)
class Slice:
    """What Google says of a slice: `words` for a person, the number of its workers, when its
    machines were created (seconds since 1970; None before)."""

    phase: SlicePhase
    words: str
    num_workers: int = 0
    created: float | None = None


_INSTALL = "https://cloud.google.com/sdk/docs/install says how"
# The first pattern that is found in what gcloud says; `{}` is the zone.
_MEANINGS: tuple[tuple[str, type[CloudError], str, str | None], ...] = (
    (
        r"active account selected|gcloud auth login|[Rr]eauthenticat|UNAUTHENTICATED|invalid_grant",
        CloudError,
        "gcloud is not logged in",
        "gcloud auth login",
    ),
    (
        r"(property|attribute) \[(core/)?project\]",
        CloudError,
        "gcloud has no project",
        "name it with `--project`, or `gcloud config set project PROJECT`",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|it is disabled",
        CloudError,
        "the TPU API is disabled in this project",
        "gcloud services enable tpu.googleapis.com",
    ),
    (
        r"ermission denied on 'locations/|[Ll]ocation .* (is not found|not found|is invalid)"
        r"|Invalid value for field.*zone",
        CloudError,
        "there are no TPUs in the zone {}",
        "gcloud compute tpus locations list",
    ),
    (
        r"ccelerator ?[Tt]ype.*(not (found|available|supported)|invalid|[Uu]nknown|does not exist)"
        r"|(not (found|available|supported)|[Ii]nvalid|[Uu]nknown) accelerator ?[Tt]ype",
        CloudError,
        "the zone {} does not have this kind of slice",
        "gcloud compute tpus accelerator-types list --zone {}",
    ),
    (r"Limit: 0\b|[Ll]imit 0 ", CloudError, "the quota for this kind of TPU is 0 in {}", "QUOTA"),
    (
        r"[Qq]uota.*(exceeded|exhausted)|RESOURCE_EXHAUSTED",
        TryAgain,
        "the quota is used up",
        "QUOTA",
    ),
    (r"no more capacity|[Ii]nsufficient|STOCKOUT", TryAgain, "there is no capacity in {}", None),
    (
        r"ALREADY_EXISTS|already exists",
        NameTaken,
        "the name is taken in {} by what was not launched from here",
        "choose another with `--name`",
    ),
    (r"NOT_FOUND|was not found|could not be found|does not exist", NotThere, "not there", None),
    (
        r"PERMISSION_DENIED|does not have permission|[Rr]equired '[\w.]+' permission",
        CloudError,
        "this account may not do that",
        "it needs the roles TPU Admin and Service Account User in the project",
    ),
    (
        r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|Max retries|onnection|[Tt]imed? ?out|\b50[0234]\b"
        r"|ServerNotFound|unable to find the server|ABORTED",
        TryAgain,
        "Google did not answer",
        None,
    ),
)
_QUOTA = "https://console.cloud.google.com/iam-admin/quotas shows it; ask for more there"


def meaning(said: str, zone: str, doing: str) -> CloudError:
    """The error that gcloud's own words are, which are kept in it."""
    lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines()[-1:]
    last = re.sub(r"^ERROR: (\([\w.-]+\) )?", "", lines[0].strip())[:500] if lines else "no reason"
    for pattern, kind, what, hint in _MEANINGS:
        if re.search(pattern, said):
            advice = _QUOTA if hint == "QUOTA" else hint and hint.replace("{}", zone)
            return kind(f"{doing}: {what.replace('{}', zone)} (gcloud: {last})", advice)
    return Unclear(f"{doing}: gcloud failed: {last}")


def create_words(launch: Launch) -> list[str]:
    """The words after `gcloud compute tpus` that ask for a launch's slice."""
    words = ["queued-resources", "create", launch.name, f"--node-id={launch.name}"]
    words += [f"--accelerator-type={launch.accelerator}", f"--runtime-version={launch.image}"]
    return words + ["--spot"] * launch.spot


def place_words(zone: str, project: str | None) -> list[str]:
    """The words that say where a slice is."""
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


class Gcloud:
    """Calls in one zone of one project (None is gcloud's own default)."""

    def __init__(self, zone: str, project: str | None):
        self.zone = zone
        self._place = place_words(zone, project)

    def check(self) -> None:
        """Raises: CloudError when gcloud is not installed, or not logged in."""
        words = ("auth", "list", "--filter=status:ACTIVE", "--format=json", "--quiet")
        if not _json(_run(words, self.zone, "looking for a login")):
            raise CloudError("gcloud is not logged in", "gcloud auth login")

    def create(self, launch: Launch, held: IO[str]) -> None:
        """Asks for a slice; `held` stays open in gcloud, so that its lock outlives this process."""
        self._call(*create_words(launch), held=held)

    def delete(self, name: str) -> None:
        """Asks to delete a slice, whatever state it is in; nothing where there is none."""
        with contextlib.suppress(NotThere):
            self._call("queued-resources", "delete", name, "--force", "--async")

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
        words = (now or "") if not vm or vm == "READY" else f"{now}, its machines {vm}"
        if now == "FAILED":
            reason = ((state.get("failedData") or {}).get("error") or {}).get("message")
            words += f" ({reason})" if reason else ""
        workers = len((node or {}).get("networkEndpoints") or [])
        return Slice(phase(now, vm), words, workers, _seconds((node or {}).get("createTime")))

    def ssh(self, name: str, command: str, seconds: float) -> dict[int, str]:
        """What the command printed on each worker that could be reached, by number."""
        with tempfile.TemporaryDirectory(prefix="glam-ssh-") as folder:
            words = ("--worker=all", f"--command={command}", f"--output-directory={folder}")
            # There gcloud 528 loses the path of the folder: it writes to `None/0.log`.
            Path(folder, "None").mkdir()
            try:
                self._call("tpu-vm", "ssh", name, *words, seconds=seconds, cwd=folder)
            except NotThere as error:
                raise TryAgain(error.what) from error  # it has just gone
            except TryAgain:
                pass  # also when the command failed on one worker only, or one did not answer
            logs = {int(each.stem): each for each in Path(folder).rglob("*.log")}
            said = {worker: _text(log) for worker, log in sorted(logs.items())}
        return {worker: text for worker, text in said.items() if text}

    def scp(self, name: str, source: Path, target: str, seconds: float) -> None:
        """Copies a folder to `target` in the home folder of every worker."""
        words = (str(source), f"{name}:{target}", "--recurse", "--worker=all")
        self._call("tpu-vm", "scp", *words, seconds=seconds)

    def _describe(self, kind: str, name: str) -> dict[str, Any] | None:
        try:
            found = _json(self._call(kind, "describe", name, "--format=json"))
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
        raise meaning(done.stderr or done.stdout, zone, doing)
    return done.stdout


def _json(text: str) -> Any:
    try:
        return parse_json(text or "null")
    except ValueError as error:
        raise TryAgain(f"gcloud answered what is not JSON: {error}") from error


def _text(log: Path) -> str:
    return read_file(log, MAX_ANSWER_BYTES).decode(errors="replace")


def _seconds(time: str | None) -> float | None:
    try:
        return datetime.fromisoformat(time or "").timestamp()
    except ValueError:
        return None
