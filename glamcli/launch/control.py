"""The loop that looks after a launch: a slice is asked for, installed, started, watched, and asked
for again, until the run has ended or somebody stops it.

What is true is asked of Google and of the workers each time; the record only says what is wanted.
So the loop may be killed at any moment and begun again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from glamcli.errors import CloudError, LaunchError
from glamcli.launch.creation import create_slice
from glamcli.launch.decisions import MAX_ENDS, MAX_FAILED, End, SlicePhase, end_of, wait_seconds
from glamcli.launch.ending import Patience, bill, give_back, is_anothers
from glamcli.launch.gcloud import Gcloud, Slice
from glamcli.launch.meaning import NoLogin, TryAgain, Unclear
from glamcli.launch.presence import Presence
from glamcli.launch.record import Creating, Launch, Record, Stopped
from glamcli.launch.silence import Hearing, Silence
from glamcli.launch.workers import SliceWorkers, Told
from glamcli.progress import Progress, duration

SKEW_SECONDS = 60.0
MAX_INSTALLS = 3
MAX_STARTS = 5
"""of one attempt."""
SOON_SECONDS = 3600.0
"""a request that failed later was in order: it waited until it was no longer good."""
MAX_UNCLEAR = 6
"""times in a row that gcloud may fail for an unknown reason, in a quarter of an hour."""
SHOWN_LINES = 20
"""of the log of a worker that failed, if it is not worker 0, whose log is shown anyway."""


@dataclass
class Control:
    """One launch, looked after."""

    launch: Launch
    record: Record
    cloud: Gcloud
    progress: Progress
    show: Callable[[str], object]
    """receives what worker 0 prints."""
    patience: Patience
    keep: bool = False
    """leave the slice when the run has ended."""
    _said: str = ""
    _tries: int = 0
    _unclear: int = 0
    _failed: int = 0
    """requests since there was a slice."""
    _asked: float = 0.0
    """when the last request was made."""
    _installs: int = 0
    _starts: int = 0
    _hearing: Hearing = field(default_factory=Hearing)
    _first_end: float | None = None
    _more: bool = False
    """whether the log goes on."""

    def __post_init__(self) -> None:
        self._presence = Presence(self.launch, self.record)

    @property
    def _newest(self) -> int:
        """The newest saved step that was seen."""
        return max(self.launch.step, self._hearing.step)

    def run(self) -> int:
        """Looks after the launch until its run has ended; the exit code.

        Raises: Stopped when somebody asked for its end; LaunchError when it cannot go on.
        """
        if self.launch.ended is not None:  # whoever looked after it was gone before its slice was
            self._give_back()
        while self.launch.ended is None:
            try:
                self._look()
                self._tries = self._unclear = 0
            except (TryAgain, NoLogin, Creating) as error:
                self._tries += 1
                self._unclear += isinstance(error, Unclear)
                self._bear(error)
            if self.launch.ended is None:
                wait = wait_seconds(self._tries, self.patience.look)
                self._sleep(0 if self._more else wait)
        return self.launch.code

    def _bear(self, error: LaunchError) -> None:
        if isinstance(error, NoLogin):
            if not self.launch.slices:
                raise error
            if f"{error.what}; trying again" != self._said:
                self.progress.warn(f"nobody looks after the slice until you log in: {error.hint}")
        if self._unclear >= MAX_UNCLEAR:
            raise error
        self._say(f"{error.what}; trying again")

    def _look(self) -> None:
        self._more = False
        self._presence.check_wanted()
        found = self.cloud.find(self.launch.name)
        if is_anothers(self.launch, found):
            raise LaunchError(
                f"slice `{self.launch.name}` is not of this launch any more: its label is "
                f"{found.label}, not {self.launch.id}"
            )
        if found.phase in (SlicePhase.READY, SlicePhase.WAITING):
            self._presence.expect(True)
        if found.phase is SlicePhase.READY:
            self._failed = 0
            self._ready(found)
            return
        self._hearing.another_slice()
        self._installs = self._starts = 0
        if found.phase is SlicePhase.ABSENT and self._presence.missing(self._newest):
            return
        if found.phase in (SlicePhase.ABSENT, SlicePhase.LOST) and self.launch.costs:
            self._lost()
        if found.phase is SlicePhase.ABSENT:
            self._create()
            return
        self._say(f"slice {self.launch.name}: {found.words}")
        if found.phase is SlicePhase.LOST:
            self._presence.delete(self.cloud)
        elif found.phase is SlicePhase.FAILED:
            self._refused(found)

    def _create(self) -> None:
        self._asked = time.time()
        create_slice(self.launch, self.record, self.cloud)
        self._say(
            f"asked for slice {self.launch.name}, {self.launch.accelerator} in {self.launch.zone}"
        )

    def _lost(self) -> None:
        self.launch.closed()
        self._save()
        self.progress.warn(
            f"the slice is lost, after {duration(3600 * self.launch.hours)} in all; "
            f"the newest step seen is {self._newest}; asking for another one"
        )

    def _refused(self, found: Slice) -> None:
        soon = time.time() - self._asked < SOON_SECONDS
        self._failed = self._failed + 1 if soon else 1
        if self._failed >= MAX_FAILED:
            how = f"{self._failed} requests for a slice failed: {found.words}"
            self._end(how, LaunchError.exit_code)
            return
        self._presence.delete(self.cloud)
        raise TryAgain(f"the request for a slice failed: {found.words}")

    def _ready(self, found: Slice) -> None:
        launch, now, num_workers = self.launch, time.time(), max(found.num_workers, 1)
        if bill(launch, found):
            self._another()
            self._say(f"slice {launch.name}: ready, {found.num_workers} workers")
        workers = SliceWorkers(launch, self.cloud)
        told = workers.ask(launch.shown)
        if any(each is not None and each.stopped for each in told.values()):
            self._presence.leave()
        if len(told) < num_workers:
            self._silent(told, num_workers, now)
            return
        here = {worker: each for worker, each in told.items() if each is not None}
        self._hearing.all_answer(max((each.step for each in here.values()), default=0))
        if len(here) < len(told) or any(each.digest != launch.digest for each in here.values()):
            self._install(workers, len(told))
        elif any(each.attempt != launch.attempt for each in here.values()):
            self._start(workers, here)
        else:
            self._installs = self._starts = 0
            self._show(here[min(here)])
            self._judge(workers, here, now)

    def _silent(self, told: Mapping[int, object], num_workers: int, now: float) -> None:
        missing = ", ".join(str(each) for each in range(num_workers) if each not in told)
        some, heard = bool(told), self.launch.shown > 0
        silence = self._hearing.silent(now, self.patience.silence, heard, some)
        if silence is Silence.WAIT:
            said = f" ({self.cloud.ssh_error})" if self.cloud.ssh_error else ""
            self._say(f"no answer over ssh from worker {missing} (of {num_workers}){said}")
        elif silence is Silence.ALL:
            self._say(
                "no worker answers for long: maybe this machine has no network; the slice is left, "
                "and goes on costing money"
            )
        elif silence is Silence.REPLACE:
            self._say(f"no answer from worker {missing} for long: giving the slice back")
            self._presence.delete(self.cloud)
        else:
            why = "a firewall? (docs/tpu.md)" if silence is Silence.NEVER else silence.value
            never = "never answered" if silence is Silence.NEVER else "does not answer"
            self._end(f"worker {missing} {never} over ssh; {why}", LaunchError.exit_code)

    def _install(self, workers: SliceWorkers, num_workers: int) -> None:
        self._installs += 1
        self.launch.shown = 0  # of a log that is not there any more
        self._save()
        try:
            with self.progress.phase(f"installing glam on {num_workers} workers"):
                workers.send(self.record, num_workers)
        except CloudError as error:
            if self._installs < MAX_INSTALLS:
                raise TryAgain(error.what) from error
            self._end(f"{error.what} ({MAX_INSTALLS} times)", LaunchError.exit_code)

    def _start(self, workers: SliceWorkers, told: Mapping[int, Told]) -> None:
        clocks = [each.clock for each in told.values()]
        if max(clocks) - min(clocks) > SKEW_SECONDS:
            apart = duration(max(clocks) - min(clocks))
            self.progress.warn(f"the clocks of the workers are {apart} apart")
        self._first_end = None
        self._starts += 1
        worker, said = workers.start(self.launch.attempt, len(told))
        if self._starts >= MAX_STARTS:
            how = f"start {self.launch.attempt} was tried {MAX_STARTS} times; {worker}: {said}"
            self._end(how, LaunchError.exit_code)
            return
        self._say(f"start {self.launch.attempt}, on {len(told)} workers")

    def _show(self, first: Told) -> None:
        if first.text:
            self.show(first.text)
            self.launch.shown = first.offset
            self.record.save_unless_stopped(self.launch, shared=False)

    def _judge(self, workers: SliceWorkers, told: Mapping[int, Told], now: float) -> None:
        ended = {worker: each.code for worker, each in told.items() if each.code is not None}
        if not ended:
            return
        self._first_end = self._first_end or now
        waiting = len(ended) < len(told) and now - self._first_end < self.patience.apart
        self._more = not waiting and told[min(told)].rest > 0
        if waiting or self._more:
            return
        end, logs = end_of(ended), workers.keep_logs(self.record)
        if end.code and end.worker != min(told):
            for line in logs.get(end.worker, [])[-SHOWN_LINES:]:
                self.show(f"worker {end.worker}: {line}\n")
        step = max(each.step for each in told.values())
        if end.again:
            self._again(end, step)
        else:
            self.launch.step = step
            self._end("done" if end.code == 0 else end.words, end.code)

    def _again(self, end: End, step: int) -> None:
        """Another start, unless the last ones brought nothing."""
        launch = self.launch
        launch.failures = 0 if step > launch.step else launch.failures + 1
        launch.step = max(launch.step, step)
        if launch.failures >= MAX_ENDS:
            self._end(
                f"{end.words}, the last of {launch.failures} ends in a row without a new "
                f"checkpoint after step {launch.step}",
                end.code if end.code > 0 else 128 - end.code,
            )
            return
        self._another()
        self._say(f"{end.words}, saved step {step}: starting again")
        self._sleep(wait_seconds(launch.failures, self.patience.look) if launch.failures else 0)

    def _another(self) -> None:
        self.launch.attempt += 1
        self.launch.shown = 0
        self._starts = 0
        self._save()

    def _end(self, how: str, code: int) -> None:
        """The run is over: what costs money is given back, unless it is to be kept. That is saved
        first: no other slice is asked for if this process is killed meanwhile."""
        self.launch.ended, self.launch.code = how, code
        self.launch.kept = self.keep and self.launch.costs
        self._save()
        self._give_back()

    def _give_back(self) -> None:
        if not self.launch.kept:
            give_back(self.launch, self.cloud, self.progress, self.patience)
            self._save()

    def _save(self) -> None:
        self.record.save_unless_stopped(self.launch)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.record.stopped and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        if self.record.stopped:
            raise Stopped(f"`{self.launch.name}` was stopped")

    def _say(self, text: str) -> None:
        """Once, however often it is true."""
        if text != self._said:
            self._said = text
            self.progress.say(text)
