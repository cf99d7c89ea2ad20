"""The machines of a launch's slice: what they are sent, what they are told, what they answer."""

import contextlib
import shlex
from dataclasses import dataclass, replace

from glamcli import atomic
from glamcli.errors import CloudError
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.in_bucket import newest_step
from glamcli.launch.record import Launch, Record
from glamcli.launch.worker import ANSWER
from glamcli.storage import is_url
from glamcli.untrusted import parse_as

INSTALL_SECONDS = 1800.0
SSH_SECONDS = 300.0
HOME_FOLDER = "glam-launch"
"""in the home folder of every worker."""
LAST_LINES = -1
"""instead of an offset into the log."""


@dataclass(frozen=True)
class Told:
    """What a worker says of itself (`worker.status`)."""

    digest: str | None
    """of the package that is installed."""
    attempt: int
    """the newest start."""
    code: int | None
    """its exit code; None while it runs."""
    step: int
    """the newest saved step of the run."""
    clock: float
    offset: int
    """into the log of that start: where `text` ends."""
    rest: int
    """bytes of the log after that."""
    text: str
    stopped: bool = False
    """whether somebody asked for the end of the launch."""


class SliceWorkers:
    """The machines of a launch's slice."""

    def __init__(self, launch: Launch, cloud: Gcloud):
        self._name, self._cloud, self._run_url = launch.name, cloud, launch.run
        self._folder = f"{HOME_FOLDER}/{launch.name}"

    def ask(self, offset: int) -> dict[int, Told | None]:
        """What each worker that answers says, with its log from `offset` on; None of one that was
        sent nothing yet."""
        unsent = f"test -e {self._folder}/package.json || {{ echo '{ANSWER}null'; exit 0; }}"
        said = self._run(f"{unsent}; {self._python('status', offset)}", SSH_SECONDS)
        told = {worker: answer for worker, text in said.items() for answer in _answers(text)}
        if told and is_url(self._run_url):
            step = newest_step(self._run_url)
            told = {worker: each and replace(each, step=step) for worker, each in told.items()}
        return told

    def send(self, record: Record, num_workers: int) -> None:
        """Sends the package and installs it.

        Raises: CloudError with what the first worker said on which that failed.
        """
        # Where this is not the first time, as after one machine was replaced, the others still run.
        end = f"if [ -e {self._folder}/worker.py ]; then {self._python('kill')}; fi"
        self._run(f"{end}; rm -rf {self._folder} && mkdir -p {HOME_FOLDER}", SSH_SECONDS)
        self._cloud.scp(self._name, record.folder / "package", self._folder, INSTALL_SECONDS)
        said = self._run(self._python("install"), INSTALL_SECONDS)
        if failed := self._failed(said, num_workers):
            raise CloudError(f"{failed[0]}: glam was not installed: {failed[1]}")

    def start(self, attempt: int, num_workers: int) -> tuple[str, str]:
        """Starts the command on every worker where this start, or a later one, is not known; the
        first worker on which that failed, and its words."""
        said = self._run(self._python("start", attempt), SSH_SECONDS)
        return self._failed(said, num_workers) or ("no worker", "all took it")

    def stop(self) -> None:
        """Asks the command to save and to end."""
        self._run(self._python("stop"), SSH_SECONDS)

    def keep_logs(self, record: Record) -> dict[int, list[str]]:
        """The last lines of the workers' logs, which are also kept as files of the record."""
        found = {}
        with contextlib.suppress(CloudError, OSError):
            for worker, told in self.ask(LAST_LINES).items():
                if told is not None and told.attempt:
                    found[worker] = told.text.splitlines()
                    name = f"worker-{worker}-start-{told.attempt}.log"
                    atomic.write(record.folder / "logs" / name, told.text)
        return found

    def _failed(self, said: dict[int, str], num_workers: int) -> tuple[str, str] | None:
        """The first worker that did not answer, if any, and what it said last, or gcloud did."""
        for worker in range(num_workers):
            text = said.get(worker, "")
            if ANSWER not in text:
                last = [line for line in text.splitlines() if line.strip()][-3:]
                return f"worker {worker}", "; ".join(last) or self._cloud.ssh_error or "no word"
        return None

    def _python(self, *words: object) -> str:
        return shlex.join(["python3", f"{self._folder}/worker.py", *map(str, words)])

    def _run(self, command: str, seconds: float) -> dict[int, str]:
        return self._cloud.ssh(self._name, command, seconds)


def _answers(text: str) -> list[Told | None]:
    """The last answer in what a worker printed, if there is one."""
    lines = [line for line in text.splitlines() if line.startswith(ANSWER)]
    last = lines[-1].removeprefix(ANSWER) if lines else ""
    if last == "null":
        return [None]
    with contextlib.suppress(ValueError):
        return [parse_as(Told, last.encode())]
    return []
