"""Errors that a user can act on, one class per kind, each with its exit code.

Every error says what is wrong (`what`: place, key, value) and, if there is one, the thing to do
about it (`hint`). The command line prints both and exits with `exit_code`; a traceback shown to a
user is a bug. Nothing here imports anything else of the project.
"""

import json
import re
import unicodedata
from collections.abc import Iterator

EXIT_PREEMPTED = 75
EXIT_WATCHDOG = 86
# As a shell reports SIGINT, SIGABRT (`jax.distributed` aborts when it misses another process) and
# SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_PEER_GONE = 134
EXIT_BROKEN_PIPE = 141

# Up to the last `@` before a slash; a query of a web address, and any that has a `key=value`. A
# path made of an address has lost one of two slashes.
_USER = re.compile(r"(:/{1,2})[^/\s`'\"]+@")
_QUERY = re.compile(
    r"(https?:/{1,2}[^\s`'\"?]*\?)[^\s`'\")]+|(:/{1,2}[^\s`'\"?]*\?)[^\s`'\")=]*=[^\s`'\")]*"
)
_NAMES: dict[str, str] = {}


def name_folder(folder: str, name: str) -> None:
    """Lets all that is told call a folder by another name from now on, and what is in it: the copy
    of a run in a bucket by its URL."""
    _NAMES[folder] = _NAMES[json.dumps(folder)[1:-1]] = name


def named(text: str) -> str:
    """The text with these names."""
    for folder, name in _NAMES.items():
        text = text.replace(folder, name)
    return text


def redacted(text: str) -> str:
    """The text without the credentials in its URLs: names, passwords, signatures and tokens."""
    text = _USER.sub(r"\1***@", text)
    return _QUERY.sub(lambda found: (found[1] or found[2]) + "***", text)


def printable(text: str) -> str:
    """The text to be shown: `named`, and all control characters but line ends escaped. Spaces of
    every kind stay, and so do joiners and non-joiners, which names in Persian and emoji need."""
    return "".join(
        char if _is_shown(char) else char.encode("unicode_escape").decode() for char in named(text)
    )


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in "\n\u200c\u200d" or unicodedata.category(char) == "Zs"


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ if cause.__suppress_context__ else cause.__context__


def first_of(items: list[str], limit: int) -> list[str]:
    """At most `limit` of them, and how many more there are."""
    return items[:limit] + [f"and {len(items) - limit} more"] * (len(items) > limit)


class GlamError(Exception):
    """A mistake that a user can act on; its texts never contain credentials of URLs."""

    exit_code = 1
    is_shown = False
    """whether the user has seen it already, when that could not wait."""

    def __init__(self, what: str, hint: str | None = None, key: str | None = None):
        self.what = redacted(named(what))
        self.key = key
        """the recipe's key that decides it, when only a caller knows the file (config/load.py)"""
        self.hint = None if hint is None else redacted(named(hint))
        super().__init__(self.what)

    def __str__(self) -> str:
        return self.what


class RecipeError(GlamError):
    """A recipe, mixture or suite file, or a command line, that makes no sense."""

    exit_code = 2


class DataError(GlamError):
    """A source, tokenizer or prepared dataset that cannot be used as it is."""

    exit_code = 3


class DamagedRecord(DataError):
    """A row of the batch of a step that cannot be used."""

    def __init__(self, what: str, hint: str | None, step: int):
        super().__init__(what, hint)
        self.step = step


class CheckpointError(GlamError):
    """A checkpoint that is missing, unreadable, or of another run."""

    exit_code = 4


class DamagedCheckpoint(CheckpointError):
    """A saved step that cannot be used; an older one may be."""


class SaveFailed(CheckpointError):
    """A checkpoint that could not be written, for a reason that may pass."""


class PlanError(GlamError):
    """A step that does not fit the target devices."""

    exit_code = 5


class TrainError(GlamError):
    """A run that stopped because its numbers are no longer usable."""

    exit_code = 6


class CrashLoop(GlamError):
    """A run that failed the same way too often; its exit code is that of the last failure."""

    def __init__(self, what: str, hint: str, exit_code: int):
        super().__init__(what, hint)
        self.exit_code = exit_code


class LaunchError(GlamError):
    """A launch that cannot begin or go on; a slice may exist."""

    exit_code = 7


class CloudError(LaunchError):
    """What `gcloud` could not do, with its own words."""


class HostError(GlamError):
    """Another process of the run did not connect, or is gone."""

    exit_code = EXIT_PEER_GONE


class Preempted(GlamError):
    """The run received a signal, saved its state, and can be resumed."""

    exit_code = EXIT_PREEMPTED
