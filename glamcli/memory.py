"""Running out of memory, on the devices or beside them, as an error that says what to change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from glamcli.errors import PlanError

_MARK = "RESOURCE_EXHAUSTED"
# A computation on CPUs whose argument was never made.
_PASSED_ON = "INTERNAL: Error dispatching computation: Out of memory"


@contextmanager
def explaining_memory(hint: Callable[[], str]) -> Iterator[None]:
    """Raises: PlanError, with the `hint`, for what XLA, numpy or Python raise without memory."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split("\n")[0].split())[:240]
        if isinstance(error, MemoryError):
            what = f"out of memory: {text}" if text else "out of memory"
        elif _MARK in text or text.startswith(_PASSED_ON):
            what = f"out of device memory: {text.partition(_MARK)[2].lstrip(': ') or text}"
        else:
            raise
        raise PlanError(what, hint=hint()) from error
