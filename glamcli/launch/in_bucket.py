"""What the launch of a run in a bucket keeps there, so that any machine can look at it and end it.

gs://bucket/run/launch/launch.json    the record
                       stopped        the id of the launch that is to end: it asks for no slice
                       package/       what the workers fetch: all but the secret of the run
                       logs/          of every worker and start, uploaded by the workers
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from glamcli import atomic
from glamcli.errors import LaunchError
from glamcli.launch.meaning import TryAgain
from glamcli.launch.record import Launch, shared_folder
from glamcli.storage import Remote, place
from glamcli.stored_runs import STEPS
from glamcli.untrusted import MAX_FILE_BYTES, parse_as

_SENT_BY_SSH = ("worker.py", "package.json")  # the second has the secret of the run
_LOGIN = "gcloud auth application-default login"
_LOG = re.compile(r"worker-(\d+)-start-(\d+)\.log")


class LaunchFolder:
    """The folder of the launch in a bucket's run folder."""

    def __init__(self, run: str):
        found = shared_folder(run)
        assert found is not None, run
        self.url: Remote = found

    def check(self) -> None:
        """Raises: LaunchError when the bucket does not answer, or cannot be written."""
        probe = self.url / "probe"
        try:
            probe.write(b"glam")
            probe.unlink()
        except FileNotFoundError as error:
            bucket = "/".join(str(self.url).split("/")[:3])
            hint = f"gcloud storage buckets create {bucket} --location=REGION, that of the zone"
            raise LaunchError(f"{bucket}: {error.strerror}", hint) from error
        except OSError as error:
            raise LaunchError(
                f"{self.url} cannot be written: {error.strerror}",
                f"{_LOGIN}; the account needs the role Storage Object Admin",
            ) from error

    def send(self, package: Path) -> None:
        """Uploads a package, of which only what is sent over ssh stays here, with the digests of
        all that the workers have to fetch.

        Raises: LaunchError.
        """
        facts, fetch = json.loads((package / "package.json").read_text()), {}
        try:
            for path in sorted(package.iterdir()):
                if path.name not in _SENT_BY_SSH:
                    data = path.read_bytes()
                    (self.url / "package" / path.name).write(data)
                    fetch[path.name] = hashlib.sha256(data).hexdigest()
                    path.unlink()
            text = json.dumps(facts | {"fetch": fetch}, indent=1) + "\n"
            atomic.write(package / "package.json", text)
        except OSError as error:
            raise LaunchError(f"{error.filename}: {error.strerror}; not uploaded") from error

    def load(self) -> Launch:
        """The record. Raises: LaunchError when there is none."""
        path = self.url / "launch.json"
        try:
            data, version = path.read_at()  # as a whole, though it is written meanwhile
            if version:
                return parse_as(Launch, data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LaunchError(f"{path} cannot be read: {reason}", _LOGIN) from error
        what = f"nothing was launched into {self.url.parent}"
        raise LaunchError(what, "give the URL that `glam launch --run` was given")

    def stop(self, launch: Launch) -> None:
        """From here on no slice is asked for, wherever the launcher is.

        Raises: LaunchError when the bucket cannot be written.
        """
        try:
            (self.url / "stopped").write(launch.id.encode())
        except OSError as error:
            raise LaunchError(f"{self.url}/stopped: {error.strerror}", _LOGIN) from error

    def await_asked(self, say: Callable[[str], object], seconds: float) -> str | None:
        """Waits so long for a request that had begun before the launch was stopped; in words what
        may still come then.

        Raises: LaunchError when the bucket does not say.
        """
        until, said = time.monotonic() + seconds, False
        while self.load().asking:
            if time.monotonic() > until:
                return "a launcher elsewhere is creating the slice"
            if not said:
                say("waiting: a launcher elsewhere is creating the slice")
            said = True
            time.sleep(1.0)
        return None

    def logs(self, worker: int) -> str:
        """The log of a worker, of all starts. Raises: LaunchError when there is none."""
        folder = self.url / "logs"
        try:
            found = [match for name in folder.files() if (match := _LOG.fullmatch(name))]
            mine = sorted((int(m[2]), m[0]) for m in found if int(m[1]) == worker)
            texts = [(folder / name).read(MAX_FILE_BYTES) for _, name in mine]
        except OSError as error:
            raise LaunchError(f"{folder} cannot be read: {error.strerror}", _LOGIN) from error
        if not texts:
            raise LaunchError(f"no log of worker {worker} in {folder} yet")
        return b"".join(texts).decode(errors="replace")


def launch_folder(run: str) -> LaunchFolder | None:
    """None where the run is in a mounted folder."""
    return None if shared_folder(run) is None else LaunchFolder(run)


def newest_step(run: str) -> int:
    """The newest saved step of a run in a bucket; 0 before the first.

    Raises: TryAgain when the bucket does not say.
    """
    path = cast(Remote, place(run) / STEPS)
    try:
        names = parse_as(dict[str, str], path.read_at()[0] or b"{}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TryAgain(f"{path} cannot be read: {reason}") from error
    steps = {name.split("/")[0] for name in names}
    return max((int(step) for step in steps if step.isdigit()), default=0)
