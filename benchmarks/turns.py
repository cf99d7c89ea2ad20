"""The worker's side of `train_step.py`: one program that takes its steps when told to."""

import json
import resource
import sys
from collections.abc import Callable
from typing import TextIO


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_turns(
    step: Callable[[], float],
    steps: int,
    summary: Callable[[], dict[str, float]],
    out: TextIO | None = None,
) -> None:
    """Says that it is ready; then `steps` step times for each line read, and last its summary."""
    out = out or sys.stdout
    print(json.dumps("ready"), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps([step() for _ in range(steps)]), file=out, flush=True)
    print(json.dumps({"peak_bytes": peak_bytes(), **summary()}), file=out, flush=True)
