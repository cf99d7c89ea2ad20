"""What orbax, TensorStore and asyncio are told before they read or write a checkpoint: what not to
print, which clock to trust, when to give up.

Nothing of them is imported here: what is not loaded needs no setting.
"""

import contextlib
import functools
import logging
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from glamcli import s3
from glamcli.storage import prepare_libraries

STORE_RETRIES = 6
"""of one request by TensorStore: they take a minute, its default a quarter of an hour."""
# Coroutines of orbax that never start when a save fails before them.
_UNSTARTED = (
    "_create_paths|cancellable|_async_serialize_shardings|_serialize_arrays|JsonCheckpointHandler"
    "|BasePyTreeCheckpointHandler|Store"
)
_NOT_ASKED = "exception was never retrieved"
_ABANDONED = ("Event loop is closed", "Encountered error while reading array index")


@functools.cache
def ignore_abandoned_work() -> None:
    """Leaves out, from now on, what is reported, perhaps late, of other arrays when one cannot be
    read or written: orbax closes the event loop in which TensorStore's threads are at work."""
    # The module may be gone when these are called.
    hook, known, not_asked = sys.unraisablehook, _ABANDONED, _NOT_ASKED
    sys.unraisablehook = lambda raised: (
        None if str(raised.exc_value).startswith(known) else hook(raised)
    )
    message = rf"coroutine '({_UNSTARTED}).*' was never awaited"
    warnings.filterwarnings("ignore", message, RuntimeWarning)
    # With a traceback for every array: hundreds, when the program ends.
    logging.getLogger("asyncio").addFilter(lambda record: not_asked not in record.getMessage())


def prepare_for_bucket() -> None:
    """Lets TensorStore, of whose context orbax makes one for every read and write from now on, give
    up a request after `STORE_RETRIES`; and orbax find buckets of Amazon's kind."""
    prepare_libraries()
    if module := sys.modules.get("orbax.checkpoint._src.serialization.tensorstore_utils"):
        for name in ("gcs_request_retries", "s3_request_retries"):
            module._DEFAULT_OCDBT_TS_CONTEXT[name] = {"max_retries": STORE_RETRIES}
        if not hasattr(module.build_kvstore_tspec, "__wrapped__"):
            known = _knowing_s3(module.build_kvstore_tspec)
            module.build_kvstore_tspec = known  # pyright: ignore


def _knowing_s3(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What makes the specification of a key-value store for TensorStore, which has a driver for
    such buckets. Orbax (0.12) takes their URLs for local paths: it is asked for one of Google's."""

    @functools.wraps(build)
    def built(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not directory.startswith(s3.SCHEME):
            return build(directory, *args, **kwargs)
        spec = build(f"gs://{directory.removeprefix(s3.SCHEME)}", *args, **kwargs)
        spec.get("base", spec).update(s3.options(), driver="s3")
        return spec

    return built


@functools.cache
def time_saves_by_a_steady_clock() -> None:
    """Lets orbax measure its time limits, from now on, by a clock that nobody can set: if the
    wall's, which it uses, jumps forward, a save fails at once."""
    names = ("futures.future", "futures.signaling_client", "checkpointers.async_checkpointer")
    for module in (sys.modules.get(f"orbax.checkpoint._src.{name}") for name in names):
        if hasattr(module, "time"):
            clock = {**vars(time), "time": time.monotonic}
            module.time = types.SimpleNamespace(**clock)  # pyright: ignore


@contextlib.contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Silences these loggers, which report every phase; failures are raised as exceptions."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
