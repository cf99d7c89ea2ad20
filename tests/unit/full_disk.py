"""A disk without room, for tests of what becomes of a save."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glamcli.checkpoint import Checkpoints


@contextmanager
def no_room() -> Iterator[None]:
    """No file may grow beyond a thousand bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_without_room(checkpoints: Checkpoints, step: int, state: Any) -> None:
    """A background save that has ended, and failed, before anybody asks."""
    checkpoints.wait()
    with no_room():
        checkpoints.save(step, state, {})
        while checkpoints._open().is_saving_in_progress():
            time.sleep(0.01)
