"""What is kept here of every launch: what was asked for, what it cost, and two locks.

~/.local/state/glam/launches/NAME/   (XDG_STATE_HOME may move it)
    launch.json    the record
    package/       what the workers are sent
    worker-0.log   the log of worker 0, of all starts
    logs/          the last lines of all workers, of every start
    stopped        it is to end: nothing may be created any more
    .creating      held while a slice is created, also by the gcloud that creates it
    .lock          held by the one process that looks after the launch
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, cast

from glamcli import atomic
from glamcli.errors import LaunchError
from glamcli.hosts.lock import hold
from glamcli.storage import Remote, is_url, place
from glamcli.untrusted import parse_as, read_file

HOUR = 3600.0


@dataclass
class Span:
    """When a slice cost money, in seconds since 1970; `until` is None while it does."""

    since: float
    until: float | None = None


@dataclass
class Launch:
    """One run on slices that are asked for as long as it is not finished."""

    name: str
    target: str
    zone: str
    project: str | None
    accelerator: str = ""
    image: str = ""
    spot: bool = False
    run: str = ""
    id: str = ""
    """the label of its slices; none where it was launched from another machine."""
    request: str = ""
    """digest of what was asked for: the same command has the same."""
    digest: str = ""
    """of what the workers are sent."""
    dollars_per_hour: float | None = None
    """of the whole slice, by the list price on demand."""
    attempt: int = 0
    """the number of the start that is wanted; workers that do not know it have not started."""
    shown: int = 0
    """bytes of worker 0's log of this attempt that were shown."""
    step: int = 0
    """the newest saved step that was seen."""
    failures: int = 0
    """ends since then."""
    ended: str | None = None
    """how; None while it goes on."""
    code: int = 0
    gone: bool = False
    """whether Google said since the end that no slice is left."""
    kept: bool = False
    """whether a slice was left on purpose at the end."""
    slices: int = 0
    """how many were asked for."""
    asking: bool = False
    """whether a slice may just now be being asked for."""
    expected: bool = False
    """whether there is a slice, by all that was seen: if it is gone, somebody deleted it."""
    spans: list[Span] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Hours of slices so far, about: one may have come or gone while nobody looked."""
        now = time.time()
        return sum((span.until or now) - span.since for span in self.spans) / HOUR

    @property
    def dollars(self) -> float | None:
        """What they cost by the list price on demand."""
        return None if self.dollars_per_hour is None else self.hours * self.dollars_per_hour

    @property
    def costs(self) -> bool:
        """Whether, by what is known, there is a slice that costs money."""
        return bool(self.spans) and self.spans[-1].until is None

    def opened(self, since: float) -> None:
        """A slice costs money since then."""
        before = self.spans[-1].until if self.spans else None
        self.spans.append(Span(max(since, before or 0)))

    def has_none(self) -> None:
        """Google said after the end that no slice is left."""
        self.closed()
        self.gone, self.kept = True, False

    def closed(self) -> None:
        """No slice costs money any more."""
        if self.costs:
            self.spans[-1].until = time.time()


def launches_dir() -> Path:
    """The folder of all launches of this user."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "glam" / "launches"


def shared_folder(run: str) -> Remote | None:
    """Where the launch of a run in a bucket is kept; None for one in a mounted folder."""
    return cast(Remote, place(run) / "launch") if is_url(run) else None


class Stopped(LaunchError):
    """Somebody asked for the end of this launch meanwhile."""


class Creating(LaunchError):
    """Another process creates a slice for this launch just now."""


class Record:
    """The folder of one launch."""

    def __init__(self, name: str):
        self.name = name
        self.folder = launches_dir() / name

    @property
    def stopped(self) -> bool:
        """Whether the launch is to end."""
        return (self.folder / "stopped").exists()

    @property
    def log(self) -> Path:
        """What worker 0 printed, in all starts."""
        return self.folder / "worker-0.log"

    def load(self) -> Launch | None:
        """What is known of the launch; None where there was none.

        Raises: LaunchError when it cannot be read.
        """
        path = self.folder / "launch.json"
        try:
            return parse_as(Launch, read_file(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            hint = f"`gcloud compute tpus queued-resources list` shows what costs money: {path}"
            raise LaunchError(
                f"the record of `{self.name}` cannot be read: {error}", hint
            ) from None

    def save(self, launch: Launch, shared: bool = True) -> None:
        """Also into the bucket of its run, unless `shared` is false; there the next time if it does
        not answer.

        Raises: LaunchError when the folder cannot be written.
        """
        text = json.dumps(asdict(launch), indent=1) + "\n"
        with self._writing():
            atomic.write(self.folder / "launch.json", text)
        if shared and (folder := shared_folder(launch.run)):
            with suppress(OSError):
                (folder / "launch.json").write(text.encode())

    def is_stopped_elsewhere(self, launch: Launch) -> bool:
        """Whether another machine asked for the end of a launch of a run in a bucket.

        Raises: OSError when the bucket does not say.
        """
        folder = shared_folder(launch.run)
        if folder is None:
            return False
        return cast(Remote, folder / "stopped").read_at()[0] == launch.id.encode()

    def check_wanted(self, launch: Launch) -> None:
        """Before a slice is asked for. Who ends the launch from elsewhere first leaves the mark and
        then looks whether a slice is being asked for; here it is the other way round.

        Raises: Stopped; OSError when the bucket does not answer.
        """
        if folder := shared_folder(launch.run):
            (folder / "launch.json").write(json.dumps(asdict(launch)).encode())
            if self.is_stopped_elsewhere(launch):
                raise Stopped(f"`{self.name}` was stopped from another machine")

    def save_unless_stopped(self, launch: Launch, shared: bool = True) -> None:
        """Raises: Stopped, LaunchError."""
        if self.stopped:
            raise Stopped(f"`{self.name}` was stopped")
        self.save(launch, shared)

    def stop(self, say: Callable[[str], object], seconds: float) -> str | None:
        """From here on nothing is created for the launch; waits so long for a creation that has
        begun. The process that still creates then, in words."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "stopped").touch()
        until, said = time.monotonic() + seconds, False
        while True:
            try:
                with self.creating():
                    return None
            except Creating as error:
                if time.monotonic() > until:
                    return error.what
                if not said:
                    say(f"waiting: {error.what}")
                said = True
                time.sleep(0.2)

    def begin(self) -> None:
        """A launch of this name may create slices again."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)  # the secret of the run is in the package
            (self.folder / "stopped").unlink(missing_ok=True)

    @contextmanager
    def creating(self) -> Iterator[IO[str]]:
        """The lock of creation. A gcloud that has it open holds it beyond our own end.

        Raises: Creating when another process holds it.
        """

        def refuse(holder: str) -> None:
            raise Creating(f"{holder} is creating the slice")

        with self._writing():
            file = hold(self.folder / ".creating", refuse)
        with file:
            yield file

    @contextmanager
    def looking_after(self) -> Iterator[None]:
        """Raises: LaunchError when another process looks after the launch."""

        def refuse(holder: str) -> None:
            raise LaunchError(
                f"`{self.name}` is looked after by {holder}",
                f"`glam launch logs {self.name}` shows its log; "
                f"`glam launch stop {self.name}` ends it",
            )

        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = hold(self.folder / ".lock", refuse)
        with file:
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LaunchError(f"{self.folder} cannot be written: {error.strerror}") from error


def all_records() -> list[Record]:
    """The record of every launch of this user, by name; one may be damaged."""
    return [Record(path.parent.name) for path in sorted(launches_dir().glob("*/launch.json"))]
