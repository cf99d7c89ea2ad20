"""A YAML file as a tree of nodes that know their place; nothing here knows about recipes.

Read from parser events, so that tags, anchors, aliases, directives and second documents are refused
instead of acted on, as are duplicate keys, more than 32 levels and files above 1 MB. Scalars follow
a subset of the YAML 1.2 core schema with one reading only (`resolve`). `load.py` merges trees and
turns them into settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from glamcli.errors import RecipeError, printable, redacted
from glamcli.untrusted import read_file

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

# Control characters, line breaks that editors do not show, and marks that reorder text.
_HOSTILE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff"
    "\ud800-\udfff]"
)
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or `--set`."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return printable(self.file) if self.line is None else f"{printable(self.file)}:{self.line}"


@dataclass(frozen=True)
class Scalar:
    """A value as `resolve` reads it."""

    value: str | int | float | bool | None
    place: Place


@dataclass(frozen=True)
class Sequence:
    """A list; its place is that of its first mark."""

    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True)
class Mapping:
    """Keys in file order; `keys` holds the places of the keys themselves."""

    entries: dict[str, Node]
    keys: dict[str, Place]
    place: Place


Node = Scalar | Sequence | Mapping


def read_tree(path: Path, shown_as: str) -> Mapping:
    """The tree of one file; an empty file is an empty mapping."""
    text = read_text(path, shown_as)
    node = parse(text, shown_as)
    if isinstance(node, Scalar) and node.value is None:
        return Mapping({}, {}, Place(shown_as, 1))
    if not isinstance(node, Mapping):
        raise RecipeError(f"{node.place}: expected `key: value` lines at the top of the file")
    return node


def read_bytes(path: Path, shown_as: str) -> bytes:
    """The content of a small file. Raises: RecipeError when there is none, or it is a large one."""
    name = printable(shown_as)
    try:
        return read_file(path, MAX_BYTES)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise RecipeError(f"{name}: {what}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{name}: cannot be read: {printable(str(reason)).lower()}") from error


def read_text(path: Path, shown_as: str) -> str:
    """The text of a small UTF-8 file with plain line ends; a byte order mark is dropped."""
    name, data = printable(shown_as), read_bytes(path, shown_as)
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise RecipeError(
            f"{name}: not UTF-8: byte 0x{data[offset]:02x} at offset {offset}",
            hint="save the file as UTF-8",
        ) from error
    hostile = _HOSTILE.search(text)
    if hostile:
        offset = start + len(text[: hostile.start()].encode())
        line = text.count("\n", 0, hostile.start()) + 1
        raise RecipeError(
            f"{name}:{line}: character U+{ord(hostile[0]):04X} at byte offset {offset} "
            "is not allowed"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str, shown_as: str) -> Node:
    """The tree of a text; places count its lines, but those of `--set`.

    Raises: RecipeError naming the line for everything that is not plain data.
    """

    def at(item: Any) -> Place:
        mark = getattr(item, "start_mark", None) or getattr(item, "problem_mark", None)
        return Place(shown_as, None if mark is None or shown_as == "--set" else mark.line + 1)

    try:
        events = _plain_events(YAML(typ="safe", pure=True).parse(text), at)
        roots = [_node(event, events, at) for event in events]
    except YAMLError as error:
        problem = getattr(error, "problem", None) or "not readable as YAML"
        # The usual slip: `about: GLaM: a model`.
        hint = 'text that has ": " in it needs quotes' if "mapping values" in problem else None
        raise RecipeError(f"{at(error)}: {printable(str(problem))}", hint) from error
    except (ValueError, OverflowError, IndexError) as error:
        # ruamel.yaml lets `chr()` of an impossible "\U" escape through as it comes.
        raise RecipeError(f"{printable(shown_as)}: not readable as YAML") from error
    return roots[0] if roots else Scalar(None, Place(shown_as))


def _plain_events(events: Iterator[Any], at: Callable[[Any], Place]) -> Iterator[Any]:
    """The events of nodes; everything that is more than plain data is refused."""
    num_documents = 0
    for event in events:
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(
                f"{at(event)}: anchors and aliases are not allowed", hint="write the value out"
            )
        if getattr(event, "ctag", None) is not None:
            raise RecipeError(f"{at(event)}: tags are not allowed: `{shown(str(event.tag))}`")
        if isinstance(event, DocumentStartEvent):
            num_documents += 1
            if event.version or event.tags:
                raise RecipeError(f"{at(event)}: directives are not allowed")
            if num_documents > 1:
                raise RecipeError(f"{at(event)}: a second document starts here; one is allowed")
        if isinstance(event, ScalarEvent) and (hostile := _HOSTILE.search(event.value)):
            # Written as an escape such as "\e".
            raise RecipeError(f"{at(event)}: character U+{ord(hostile[0]):04X} is not allowed")
        if isinstance(event, NodeEvent | CollectionEndEvent):
            yield event


def _node(first: Any, events: Iterator[Any], at: Callable[[Any], Place], depth: int = 0) -> Node:
    """The node that starts with the event `first`; takes its further events."""
    place = at(first)
    if isinstance(first, ScalarEvent):
        return Scalar(first.value if first.style else resolve(first.value), place)
    if depth >= MAX_DEPTH:
        raise RecipeError(f"{place}: nested more than {MAX_DEPTH} levels deep")
    if isinstance(first, SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), CollectionEndEvent):
            items.append(_node(event, events, at, depth + 1))
        return Sequence(tuple(items), place)
    entries: dict[str, Node] = {}
    keys: dict[str, Place] = {}
    while not isinstance(event := next(events), CollectionEndEvent):
        if not isinstance(event, ScalarEvent):
            raise RecipeError(f"{at(event)}: a key must be text")
        key = event.value
        if key in keys:
            raise RecipeError(f"{at(event)}: `{shown(key)}` is given twice, first at {keys[key]}")
        keys[key] = at(event)
        entries[key] = _node(next(events), events, at, depth + 1)
    return Mapping(entries, keys, place)


def resolve(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means.

    Only `true`, `false`, `null`, `~`, nothing, and decimal numbers are not text. A number may have
    underscores between digits and an exponent; one with an exponent and a whole value is an
    integer, so `steps: 3e4` counts steps. Everything with two readings stays text and is refused
    where a number or a switch is due: yes, off, 010, 0x1f, 12:30, .nan, .inf.
    """
    lowered = text.lower()
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return lowered == "true"
    if len(text) > 60:
        return text
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        value = float(text)
        if "e" in lowered and value.is_integer() and abs(value) < 2**53:
            return int(value)
        # Too large for a float is not a number anybody meant.
        return text if value in (float("inf"), float("-inf")) else value
    return text


def plain(node: Node) -> Any:
    """The tree as dicts, lists and Python scalars."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return node.value


def shown(value: Any) -> str:
    """A value for a message: one line, no control characters, no credentials, not too long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = printable(redacted(str(value))[:400].replace("\n", "\\n").replace("\t", "\\t"))
    return text if len(text) <= 80 else text[:77] + "..."
