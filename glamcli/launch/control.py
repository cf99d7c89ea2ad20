"""The loop that looks after a launch: a slice is asked for, installed, started, watched, and asked
for again, until the run has ended or somebody stops it.

What is true is asked of Google and of the workers each time; the record only says what is wanted.
So the loop may be killed at any moment and begun again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glamcli.errors import CloudError, LaunchError
from glamcli.launch.decisions import MAX_ENDS, MAX_FAILED, End, SlicePhase, end_of, wait_seconds
from glamcli.launch.ending import Patience, bill, give_back
from glamcli.launch.gcloud import Gcloud, NameTaken, Slice, TryAgain, Unclear
from glamcli.launch.record import Launch, Record, Stopped
from glamcli.launch.workers import SliceWorkers, Told
from glamcli.progress import Progress, duration

SKEW_SECONDS = 60.0
MAX_INSTALLS = 3
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
    _failed: int = 0
    """requests since there was a slice."""
    _installs: int = 0
    _answered: float = 0.0
    """when all workers last did, or the slice became ready."""
    _heard: bool = False
    """whether they ever did."""
    _first_end: float | None = None

    def run(self) -> int:
        """Looks after the launch until its run has ended; the exit code.

        Raises: Stopped when somebody asked for its end; LaunchError when it cannot go on.
        """
        while self.launch.ended is None:
            try:
                self._look()
                self._tries = 0
            except TryAgain as error:
                self._tries += 1
                if isinstance(error, Unclear) and self._tries >= MAX_UNCLEAR:
                    raise
                self._say(f"{error.what}; trying again")
            if self.launch.ended is None:
                self._sleep(wait_seconds(self._tries, self.patience.look))
        return self.launch.code

    def _look(self) -> None:
        found = self.cloud.find(self.launch.name)
        if found.phase is SlicePhase.READY:
            self._failed = 0
            self._ready(found)
            return
        self._answered, self._heard, self._installs = 0.0, False, 0
        if found.phase in (SlicePhase.ABSENT, SlicePhase.LOST) and self.launch.costs:
            self._lost()
        if found.phase is SlicePhase.ABSENT:
            self._create()
            return
        self._say(f"slice {self.launch.name}: {found.words}")
        if found.phase is SlicePhase.LOST:
            self.cloud.delete(self.launch.name)
        elif found.phase is SlicePhase.FAILED:
            self._refused(found)

    def _create(self) -> None:
        launch = self.launch
        what = f"slice {launch.name}, {launch.accelerator} in {launch.zone}"
        with self.record.creating() as held:
            launch.slices += 1
            self._save()
            try:
                self.cloud.create(launch, held)
            except TryAgain:
                raise
            except CloudError as error:
                if isinstance(error, NameTaken) and launch.slices > 1:
                    raise TryAgain(error.what) from error  # our last one, not quite gone
                launch.slices -= 1
                launch.ended, launch.code = error.what, error.exit_code
                self._save()
                raise
        self._say(f"asked for {what}")

    def _lost(self) -> None:
        self.launch.closed()
        self._save()
        self.progress.warn(
            f"the slice is lost, after {duration(3600 * self.launch.hours)} in all; "
            f"the newest step seen is {self.launch.step}; asking for another one"
        )

    def _refused(self, found: Slice) -> None:
        self._failed += 1
        if self._failed >= MAX_FAILED:
            how = f"{self._failed} requests for a slice failed: {found.words}"
            self._end(how, LaunchError.exit_code)
            return
        self.cloud.delete(self.launch.name)
        raise TryAgain(f"the request for a slice failed: {found.words}")

    def _ready(self, found: Slice) -> None:
        launch, now = self.launch, time.time()
        if bill(launch, found):
            self._another()
            self._say(f"slice {launch.name}: ready, {found.num_workers} workers")
        self._answered = self._answered or now
        workers = SliceWorkers(launch, self.cloud)
        told = workers.ask(launch.shown)
        if len(told) < max(found.num_workers, 1):
            self._silent(told, max(found.num_workers, 1), now)
            return
        self._answered, self._heard = now, True
        here = {worker: each for worker, each in told.items() if each is not None}
        if len(here) < len(told) or any(each.digest != launch.digest for each in here.values()):
            self._install(workers, len(told))
        elif any(each.attempt != launch.attempt for each in here.values()):
            self._start(workers, here)
        else:
            self._show(here[min(here)])
            self._judge(workers, here, now)

    def _silent(self, told: Mapping[int, object], num_workers: int, now: float) -> None:
        missing = ", ".join(str(each) for each in range(num_workers) if each not in told)
        if now - self._answered < self.patience.silence:
            self._say(f"no answer over ssh from worker {missing} (of {num_workers})")
        elif self._heard:
            self._say(f"no answer from worker {missing} for long: giving the slice back")
            self.cloud.delete(self.launch.name)
        else:
            how = f"worker {missing} never answered over ssh; a firewall? (docs/tpu.md)"
            self._end(how, LaunchError.exit_code)

    def _install(self, workers: SliceWorkers, num_workers: int) -> None:
        self._installs += 1
        try:
            with self.progress.phase(f"installing glam on {num_workers} workers"):
                workers.send(self.record)
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
        workers.start(self.launch.attempt)
        self._say(f"start {self.launch.attempt}, on {len(told)} workers")

    def _show(self, first: Told) -> None:
        if first.text:
            self.show(first.text)
            self.launch.shown = first.offset
            self._save()

    def _judge(self, workers: SliceWorkers, told: Mapping[int, Told], now: float) -> None:
        ended = {worker: each.code for worker, each in told.items() if each.code is not None}
        if not ended:
            return
        self._first_end = self._first_end or now
        waiting = len(ended) < len(told) and now - self._first_end < self.patience.apart
        if waiting or told[min(told)].rest:
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
        self._save()

    def _end(self, how: str, code: int) -> None:
        """The run is over: what costs money is given back, unless it is to be kept."""
        if not self.keep:
            give_back(self.launch, self.cloud, self.progress, self.patience)
        self.launch.ended, self.launch.code = how, code
        self._save()

    def _save(self) -> None:
        if self.record.stopped:
            raise Stopped(f"`{self.launch.name}` was stopped")
        self.record.save(self.launch)

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
