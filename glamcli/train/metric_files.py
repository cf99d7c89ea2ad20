"""The files that the numbers of a run go to: `metrics.jsonl` and TensorBoard's event files.

Neither may stop a run: a full disk costs a warning and some lines. What a crash, a disk or a hand
left in `metrics.jsonl` is read line by line, in bounded memory.
"""

import errno
import io
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from glamcli.progress import Progress
from glamcli.untrusted import open_regular, parse_json

LINE_BYTES = 1 << 24
"""a longer line was not written by a run."""
TAIL_BYTES = 1 << 22
"""of a long file that are read to know its newest lines."""
_MARK_BYTES = 1 << 12
"""the last ones read, by which a file that was cut and has grown since is known."""
RECENT_LINES = 4
"""lines of one step: its own, of alarms, of the held-out loss, of the tasks."""
_HUGE = 1e300  # so that a sum of several stays finite


class _Output:
    """Something to write to, whose trouble costs a warning, the first time, and no run."""

    def __init__(self, path: Path, progress: Progress):
        self._path, self._progress, self._warned = path, progress, False

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason, known, self._warned = error.strerror or error, self._warned, True
            if not known:
                self._progress.warn(f"{self._path} cannot be written ({reason}); training goes on")


class MetricsFile(_Output):
    """`metrics.jsonl`: one JSON object per line, each with its `step`, in order of steps.

    A line is written by one call and removed if it did not fit, so that neither a reader nor a
    killed run ever leaves or sees half of one. Opened at the step that a run resumes from, it drops
    the lines of later steps with its first write: they will be written again, and no step is there
    twice.
    """

    def __init__(self, path: Path, step: int, progress: Progress):
        super().__init__(path, progress)
        self._file: io.FileIO | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_LINES)
        """the newest lines of the file."""
        self.seconds = 0.0
        """what the run had taken by the newest line, those to be dropped included."""
        self._drop_from: int | None = None
        with self._tolerating():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._keep_up_to(step)
            self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line, numbers that are not finite as null; a line that cannot be written is
        omitted."""
        known = json.loads(json.dumps(dict(values)), parse_constant=lambda not_finite: None)
        line = (json.dumps(known) + "\n").encode()
        if self._file is None:
            return
        with self._tolerating():
            if self._drop_from is not None:
                self._file.truncate(self._drop_from)
                self._drop_from = None
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(end)
                raise
            self.recent.append(known)

    def flush(self) -> None:
        """Everything written so far is on the disk when this returns."""
        if self._file is not None:
            with self._tolerating():
                os.fsync(self._file)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep_up_to(self, step: int) -> None:
        """Finds lines of later steps and the remains of a torn line, which the first write drops: a
        run that is killed before knows again how long they took. Where other lines between are
        damaged, the file as it was stays beside the one without them."""
        num_wrong, later, end = 0, 0, 0
        with open_regular(self._path) as file:
            for line, values in metric_lines(file):
                self.seconds = max(self.seconds, run_seconds(values))
                if values is not None and values["step"] <= step:
                    num_wrong, later, end = num_wrong + later, 0, file.tell()
                    self.recent.append(values)
                elif values is None and line.endswith(b"\n"):
                    num_wrong += 1
                else:
                    later += 1
        if num_wrong:
            self._set_aside(step, num_wrong)
        elif later:
            self._drop_from = end

    def _set_aside(self, step: int, num_wrong: int) -> None:
        path = self._path
        aside = path.with_name(f"{path.stem}.damaged-{time.time_ns()}{path.suffix}")
        path.rename(aside)
        with aside.open("rb") as file, path.open("xb") as kept:
            for line, values in metric_lines(file):
                if values is not None and values["step"] <= step:
                    kept.write(line)
        lines = "line is" if num_wrong == 1 else "lines are"
        self._progress.warn(
            f"{path}: {num_wrong} {lines} damaged or out of order and left out; "
            f"the file as it was is {aside}"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, oldest first, without damaged ones.

    Raises: OSError when it cannot be read or is not a regular file.
    """
    with open_regular(path) as file:
        return [values for _, values in metric_lines(file) if values is not None]


def metric_lines(
    file: IO[bytes], having: bytes = b""
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line that has these bytes in it, with its end, and its values; None for one that is
    damaged, torn, or too long (of which only the last part is kept in memory)."""
    while line := file.readline(LINE_BYTES):
        too_long = len(line) == LINE_BYTES and not line.endswith(b"\n")
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES) or b"\n"
        if having in line:
            yield line, None if too_long else _values(line)


class MetricsTail:
    """The newest lines of a `metrics.jsonl` that a run may be writing: of a long file the end, and
    later what is new."""

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None
        """the inode."""
        self._read_to, self._mark = 0, b""

    def new_lines(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether this is another file than before, or one that was cut; and its lines that are
        whole and not damaged, or else those that came since. None of a file that cannot be read."""
        lines = []
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                is_other = status.st_ino != self._file or self._mark != self._read_before(file)
                known = 0 if is_other else self._read_to
                self._file = status.st_ino
                self._read_to = file.seek(max(known, status.st_size - TAIL_BYTES))
                for line, values in metric_lines(file):
                    if not line.endswith(b"\n"):
                        break
                    self._read_to = file.tell()
                    lines += [values] if values is not None else []
                self._mark = self._read_before(file)
        except OSError:
            is_other, self._file = self._file is not None, None
        return is_other, lines

    def _read_before(self, file: IO[bytes]) -> bytes:
        """What is in the file before the point that was read to."""
        start = max(0, self._read_to - _MARK_BYTES)
        file.seek(start)
        return file.read(self._read_to - start)


def run_seconds(values: Mapping[str, Any] | None) -> float:
    """What a run had taken by a line of its metrics, all kinds of time; 0 if it does not say."""
    each = [value for name, value in (values or {}).items() if name.startswith("seconds/")]
    return sum(value for value in each if isinstance(value, float) and math.isfinite(value))


def as_number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else, and where it is not finite."""
    if type(value) is float:
        return value if -_HUGE < value < _HUGE else None
    if type(value) is int:  # not `True`
        return float(value) if -_HUGE < value < _HUGE else None
    return None


def _values(line: bytes) -> dict[str, Any] | None:
    """What a line says; None unless it is whole, an object, and has a whole number as its step."""
    try:
        values = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int) and not isinstance(step, bool) else None


class TensorBoard(_Output):
    """Event files of the numbers in a summary; lists become one curve per layer, except lists
    of experts: a curve each would bury the others.

    Events are written by the caller's thread: the writer of tensorboardX hands them to a thread
    through a queue of ten, and a full disk ends that thread, after which the run would wait for
    the queue forever. Here the first failure ends the event files and nothing else.
    """

    def __init__(self, folder: Path, step: int, progress: Progress):
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        # Generated code: its classes exist at run time only, out of a type checker's sight.
        proto: Any = event_pb2
        values: Any = summary_pb2
        self._event, self._values = proto.Event, values.Summary
        super().__init__(folder, progress)
        self._writer: Any = None
        with self._tolerating():
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            self._writer = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        if step:
            # Readers forget what an earlier process wrote after the step that is resumed from.
            restart = proto.SessionLog(status=proto.SessionLog.START)
            self._add(step=step + 1, session_log=restart)

    def write(self, values: Mapping[str, Any]) -> None:
        """Adds every number of a summary at its `step`."""
        scalars = [
            self._values.Value(tag=tag, simple_value=number)
            for name, value in values.items()
            for tag, number in curves(name, value)
        ]
        self._add(step=values["step"], summary=self._values(value=scalars))

    def flush(self) -> None:
        """Everything added so far is in the file when this returns."""
        self._try(lambda: self._writer.flush())

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with self._tolerating():
                self._writer.close()

    def _add(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._try(lambda: self._writer.write(event.SerializeToString()))

    def _try(self, action: Callable[[], object]) -> None:
        if not self._warned:
            with self._tolerating():
                action()


def curves(name: str, value: Any) -> list[tuple[str, float]]:
    """The curves a value belongs to: itself, or one per layer; none for text, None and experts."""
    if name in ("step", "unix_seconds"):  # every event has both
        return []
    layers = {name: value}
    if isinstance(value, list):
        layers = {f"{name}/{number}": part for number, part in enumerate(value, 1)}
    return [(curve, float(x)) for curve, x in layers.items() if isinstance(x, int | float)]
