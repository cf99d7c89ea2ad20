"""What is meant by the errors of orbax, TensorStore and the libraries of buckets, in one line.

Reading a step of a bucket fails for two reasons that must not be confused: its objects are damaged,
and an older step is taken; or the store does not answer, and no step is to blame.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glamcli.errors import causes, first_of
from glamcli.storage import in_words, is_url
from glamcli.untrusted import parse_json, read_file

SHOWN_ARRAYS = 3
# How TensorStore begins the errors of what was read, and not of reading it.
_OF_CONTENT = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
_STATUS = re.compile(r"[A-Z_]{5,}: ")
_URL = re.compile(r"\b\w+://[^\s\":\]]+")
_OF_OBJECT = re.compile(r".*\b(\w+://[^\s\":\]]+[^/\s\":\]]): ([^\[]+)")


def store_error(error: Exception, url: str) -> str | None:
    """Why the store of `url` did not let it be read; None when it did, and what it holds is not as
    it should be."""
    for cause in causes(error):
        text = str(cause)
        if isinstance(cause, ValueError | KeyError | TypeError):
            status = _STATUS.match(text)
            if status and not text.startswith(_OF_CONTENT):
                return one_line(cause, url)
        elif isinstance(cause, Exception) and type(cause) is not Exception:  # orbax's own
            known = in_words(cause, url)
            return None if isinstance(known, FileNotFoundError) else f"{url}: {known.strerror}"
    return None


def damage(state: Path, wanted: Mapping[str, Any], error: Exception) -> str:
    """What is wrong with the arrays at `state`, a folder or URL, of which those in `wanted` could
    not be read: which file or object, and which array."""
    if (fault := _damage_of_metadata(state)) is not None:
        return fault
    text = _with_urls(f"{error} {error.__cause__}", str(state))
    stored = re.findall(r'"(\S+)/[^"/]+" in OCDBT', text)
    names = [name for name in wanted if name.replace("/", ".") in stored]
    found = re.findall(r'local file "([^"]+[^/])"', text)
    if is_url(state):
        urls = (url for url in _URL.findall(text) if url.startswith(str(state)))
        found = [url for url in urls if not url.endswith("/")]
    code = os_error(error)
    what = "is damaged" if code is None else f"cannot be read: {os.strerror(code)}"
    manifest = state / "manifest.ocdbt"
    if found or not _may_exist(manifest):
        path = type(state)(found[-1]) if found else manifest
        needed = f" (`{names[0]}` is in it)" if names else ""
        return f"{_shown(path, state)} {what if _may_exist(path) else 'is missing'}{needed}"
    if names:
        return f"`{names[0]}` {what}" + (f" in {state}" if is_url(state) else "")
    return f"{_shown(state / '_METADATA', state)} {what} ({type(error).__name__})"


def _damage_of_metadata(state: Path) -> str | None:
    try:
        parse_json(read_file(state / "_METADATA"))
    except FileNotFoundError:
        what = "is missing" if is_url(state) else "is damaged"
    except (OSError, ValueError):
        what = "is damaged"
    else:
        return None
    return f"{_shown(state / '_METADATA', state)} {what}"


def _shown(path: Path, state: Path) -> str:
    return str(path) if is_url(state) else os.path.relpath(path, state.parent)


def _may_exist(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return True


def shown_names(names: list[str]) -> str:
    """The first of them, in quotes, and how many more there are."""
    return ", ".join(first_of([f"`{name}`" for name in names], SHOWN_ARRAYS))


def os_error(error: Exception) -> int | None:
    """The operating system's number for what went wrong, if it did, in Python or in TensorStore."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\[os_error_code='(\d+)'\]", f"{error} {error.__cause__}")
    return int(found[1]) if found else None


def one_line(error: BaseException, url: str = "") -> str:
    """What went wrong; from the libraries' long lines, which name a file thrice, the reason alone
    if the operating system gave one. `url` is that of the arrays that were read or written."""
    text = _with_urls(str(error), url).strip()
    lines = text.splitlines() or [type(error).__name__]
    if reason := re.search(r"\[(?:os_error_code='|Errno )(\d+)'?\]", lines[0]):
        return os.strerror(int(reason[1]))
    if found := _OF_OBJECT.match(lines[0]):
        return f"{found[1]}: {found[2].strip()}"[:240]
    return lines[0][:240]


def _with_urls(text: str, url: str) -> str:
    """An error of TensorStore's that calls objects by their URL: for buckets of Amazon's kind it
    gives names in the bucket, in quotes, and of a refusal the status alone."""
    bucket, _, name = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://"):
        return text
    text = re.sub(rf'"({re.escape(name)}[^"]*)"', rf"s3://{bucket}/\1", text)
    status = re.search(r"\[http_response_code='(\d+)'\]", text)
    return re.sub(r"\bUnknown \[", f"HTTP status {status[1]} [" if status else "no answer [", text)
