"""What the HTML pages of the program have in common: one file, no network, light and dark.

Texts of anyone become HTML by `text`; what takes HTML says so.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from glamcli.errors import printable

LARGE_CHARS = 14
"""of a figure on a card; longer ones are smaller."""
STYLE = Path(__file__).with_suffix(".css")


def document(title: str, body: str, style: str = "", head: str = "") -> str:
    """A whole page; `title` is text, everything else is HTML or CSS."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}<title>{text(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}{style}</style></head><body>{body}</body>"
        "</html>\n"
    )


def text(value: str) -> str:
    """Text of anyone as HTML, its control characters shown."""
    return escape(printable(value))


def cards(found: Iterable[tuple[str, str]]) -> str:
    """Figures, large, each with its small print; both are text."""
    each = (
        f"<div><b{' class=long' * (len(large) > LARGE_CHARS)}>{text(large)}</b>{text(small)}</div>"
        for large, small in found
    )
    return f"<div class=cards>{''.join(each)}</div>"


def share_bar(parts: Iterable[tuple[str, float]], whole: float) -> str:
    """A bar with a piece per (colour, size); what they lack of the whole stays free."""
    widths = ((colour, f"{100 * size / whole:.2f}%") for colour, size in parts)
    pieces = (f'<div style="width:{width};background:{colour}"></div>' for colour, width in widths)
    return f"<div class=bar>{''.join(pieces)}</div>"


def colour_key(colour: str) -> str:
    """A square in a colour of `share_bar`."""
    return f'<span class=key style="background:{colour}"></span>'


def escaped_rows(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows of text as cells of HTML."""
    return [tuple(map(text, row)) for row in rows]


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], sums: int = 0) -> str:
    """Cells are HTML; columns whose name starts with `>` are aligned to the right; the last `sums`
    rows stand out."""
    right = [name.startswith(">") for name in columns]

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        marked = (
            f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>"
            for cell, number in zip(cells, right, strict=True)
        )
        return f"<tr{kind}>{''.join(marked)}</tr>"

    rows = list(rows)
    names = [name.removeprefix(">") for name in columns]
    head = line(names, "th") if any(names) else ""
    body = (
        line(row, "td", " class=sum" if number >= len(rows) - sums else "")
        for number, row in enumerate(rows)
    )
    return f"<div class=wide><table>{head}{''.join(body)}</table></div>"
