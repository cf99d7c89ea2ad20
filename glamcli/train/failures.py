"""The note of the failures in a row that a run ended with: `ending.py` writes it, and everything
that shows a run reads it, without what writing it needs."""

from pathlib import Path
from typing import Any

from glamcli.untrusted import parse_json, read_file

FAILURES = "failures.json"
"""the file of the note, in the run folder."""
_MAX_BYTES = 100_000


def noted_failures(path: Path) -> tuple[dict[str, Any], float, list[tuple[str, int]]]:
    """Of which start failures in a row were noted, when (seconds since 1970), and the text and exit
    code of each.

    Raises: OSError; ValueError for a file that says something else.
    """
    saved = parse_json(read_file(path, _MAX_BYTES))
    try:
        found = [(str(what), int(code)) for what, code in saved.pop("failures")]
        return saved, float(saved.pop("time")), found
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no failures in a row: {error!r}") from None
