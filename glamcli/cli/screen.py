"""A part of the terminal that is drawn again and again."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text


def is_drawable() -> bool:
    """Whether stdout is a terminal that can go back and draw again."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


class Screen(AbstractContextManager["Screen"]):
    """Lines that are drawn again in place, on stdout; the last ones stay."""

    def __init__(self) -> None:
        self._live = Live(console=Console(highlight=False), auto_refresh=False)

    @property
    def width(self) -> int:
        """Columns of the terminal now."""
        return self._live.console.width

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def draw(self, lines: Sequence[str]) -> None:
        """Shows these, the first in bold; those that do not fit below are left out."""
        first, rest = Text(lines[0], style="bold"), (Text(line) for line in lines[1:])
        self._live.update(Group(first, *rest), refresh=True)
