"""From the sums of a step to the numbers that are shown and written, and the files they go to.

`summarise` takes the means, once, last. `MetricsFile` is `metrics.jsonl` and `TensorBoard` the
event files; neither may stop a run: a full disk costs a warning and some lines. `alarms` reads a
summary and names expert layers in trouble.
"""

import errno
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from glamcli import atomic
from glamcli.config.schema import Moe, Recipe
from glamcli.progress import Progress

LossSums = tuple[float, int]
"""Summed loss in nats, and the number of targets it is summed over."""

FAILED_TASKS = "eval/failed_tasks"
"""The key of the number of tasks that could not be scored, beside the scores of the others."""

COLLAPSE_FRAC = 0.5
"""First choices of one expert that mean its router has collapsed."""
DROPPED_FRAC = 0.3
DEAD_FRAC = 0.5

# Router statistics in the summary, without `_loss`; those of the layers are `<name>_by_layer`.
ROUTING = (
    *("balance_loss", "dropped_frac", "dropped_first_frac", "dropped_second_frac"),
    *("router_entropy_nats", "router_z_loss"),
)


def add_losses(
    totals: Mapping[str, LossSums], sums: Mapping[str, Any], source_names: Sequence[str]
) -> dict[str, LossSums]:
    """Totals (summed nats, number of targets) of all targets (`""`) and of every source, after
    another step with these sums."""
    names = ("", *source_names)
    nats = (sums["loss_nats"], *sums["source_nats"])
    counts = (sums["num_targets"], *sums["source_targets"])
    before = [totals.get(name, (0.0, 0)) for name in names]
    return {
        name: (total + float(more), num + int(count))
        for name, (total, num), more, count in zip(names, before, nats, counts, strict=True)
    }


def summarise(
    sums: Mapping[str, Any], losses: Mapping[str, LossSums], recipe: Recipe
) -> dict[str, Any]:
    """A line of numbers after one training step, flat, in the order they are written: those of
    docs/metrics.md, None where they are not finite or have no targets.

    `loss`, `perplexity` and `loss/<source>` are means over the real targets of all steps in
    `losses` (`add_losses`), everything else is of this step.
    """
    num_targets = int(sums["num_targets"])
    means = {name: _mean(*total) for name, total in losses.items()}
    loss = means.pop("")
    summary: dict[str, Any] = {
        "step": int(sums["step"]),
        "loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
        **{f"loss/{name}": mean for name, mean in means.items()},
        "total_loss": finite(sums["loss"]),
        "softmax_z": _mean(sums["z_sum"], num_targets),
        "learning_rate": finite(sums["learning_rate"]),
        "grad_norm": finite(sums["grad_norm"]),
        "param_norm": finite(sums["param_norm"]),
        "num_targets": num_targets,
        "padding_frac": 1.0 - num_targets / (recipe.batch.rows * recipe.batch.row_tokens),
        "bad_steps": int(sums["bad_steps"]),
        "bad_steps_total": int(sums["bad_steps_total"]),
    }
    if sums["routing"]:
        summary |= _routing(sums["routing"])
    return summary


def _routing(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Router statistics [expert layers, ...] as means and lists."""
    layers = {n.removesuffix("_loss"): np.asarray(stats[n], np.float64) for n in ROUTING}
    served = ("unserved_frac", "served_one_frac", "served_two_frac")
    layers |= dict(zip(served, np.asarray(stats["served_3"], np.float64).T, strict=True))
    layers["max_first_frac"] = np.asarray(stats["first_E"], np.float64).max(axis=1)
    load = np.asarray(stats["wanted_E"], np.float64)
    dead = np.sum(load == 0, axis=1)
    return {
        **{name: finite(values.mean()) for name, values in layers.items()},
        "dead_experts": int(dead.sum()),
        **{f"{name}_by_layer": [finite(v) for v in vs] for name, vs in layers.items()},
        "dead_experts_by_layer": [int(count) for count in dead],
        "load_by_layer": [[finite(share) for share in layer] for layer in load],
    }


def alarms(summary: Mapping[str, Any], moe: Moe) -> list[str]:
    """What is wrong with the routers at this step: a line per expert layer and problem, naming
    the layer and the setting to change. Empty when all is well."""
    balance = f"`moe.balance_coef` (now {moe.balance_coef:g})"
    capacity = f"`moe.capacity_factor` (now {moe.capacity_factor:g})"
    E = moe.num_experts
    found = []
    for index, first in enumerate(summary["max_first_frac_by_layer"]):
        layer = f"expert layer {index + 1}"
        dropped = summary["dropped_frac_by_layer"][index]
        dead = summary["dead_experts_by_layer"][index]
        if E > 2 and first is not None and first > COLLAPSE_FRAC:
            found.append(
                f"{layer}: {first:.0%} of tokens choose the same expert of {E} first; "
                f"raise {balance}"
            )
        if dropped is not None and dropped > DROPPED_FRAC:
            found.append(
                f"{layer}: {dropped:.0%} of choices are dropped; raise {capacity} or {balance}"
            )
        if dead > DEAD_FRAC * E:
            found.append(f"{layer}: {dead} of {E} experts get no token; raise {balance}")
    return found


def _mean(total: Any, count: Any) -> float | None:
    return finite(float(total) / int(count)) if int(count) else None


def finite(value: Any) -> float | None:
    """The number, for JSON: None where it is none or infinite."""
    return float(value) if math.isfinite(value) else None


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
    the lines of later steps: they will be written again, and no step is there twice.
    """

    def __init__(self, path: Path, step: int, progress: Progress):
        super().__init__(path, progress)
        self._file: io.FileIO | None = None
        with self._tolerating():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _keep_up_to(path, step)
            self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line, numbers that are not finite as null; a line that cannot be written is
        omitted."""
        known = json.loads(json.dumps(dict(values)), parse_constant=lambda not_finite: None)
        line = (json.dumps(known) + "\n").encode()
        if self._file is None:
            return
        with self._tolerating():
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(end)
                raise

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


def _keep_up_to(path: Path, step: int) -> None:
    """Rewrites the file without lines of later steps and without the remains of a torn line."""
    text = path.read_text()
    kept = [line for line in text.splitlines(keepends=True) if _step_of(line) <= step]
    if "".join(kept) != text:
        atomic.write(path, "".join(kept))


def _step_of(line: str) -> float:
    """The step a line belongs to; infinity for a line that is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


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
            for tag, number in _curves(name, value)
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


def _curves(name: str, value: Any) -> list[tuple[str, float]]:
    """The curves a value belongs to: itself, or one per layer; none for text, None and experts."""
    if name in ("step", "unix_seconds"):  # every event has both
        return []
    layers = {name: value}
    if isinstance(value, list):
        layers = {f"{name}/{number}": part for number, part in enumerate(value, 1)}
    return [(curve, float(x)) for curve, x in layers.items() if isinstance(x, int | float)]
