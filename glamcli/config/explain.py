"""Problems of settings as sentences: place, key, what was expected, what was given.

`validate` turns a tree into frozen settings or into every problem at once; `check.py` adds the
problems between fields.
"""

import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from glamcli.config import yaml
from glamcli.config.nearest import did_you_mean, nearest
from glamcli.config.schema import Recipe
from glamcli.config.yaml import shown
from glamcli.errors import RecipeError

_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with settings. `place` is `file:line`, `--set`, or a file."""

    place: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class Refused(RecipeError):
    """Settings with problems; the message holds all of them, one per line."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        if len(problems) == 1:
            super().__init__(f"{problems[0].place}: {problems[0].what}", hint=problems[0].hint)
        else:
            lines = "".join(f"\n  {problem}" for problem in problems)
            super().__init__(f"{len(problems)} problems:{lines}")


class WrongKey(ValueError):
    """Raised by a validator between fields: what is wrong, and at which key of its section."""

    def __init__(self, key: str, what: str):
        super().__init__(what)
        self.key = key


def refuse(problems: Sequence[Problem]) -> None:
    """Raise `Refused` with all problems; nothing when there are none."""
    if problems:
        raise Refused(problems)


def validate(root: yaml.Mapping, kind: type[_Kind]) -> _Kind:
    """The tree as settings of this kind.

    Types are strict: text is never read as a number, a number never as text or as a switch.
    Raises: RecipeError with all problems of the tree.
    """
    try:
        return kind.model_validate_json(json.dumps(yaml.plain(root)), strict=True)
    except ValidationError as error:
        raise Refused(_problems(error, root, kind)) from error


def _problems(error: ValidationError, root: yaml.Mapping, kind: type[BaseModel]) -> list[Problem]:
    unknown: dict[tuple[str, ...], Problem] = {}
    suggested: set[tuple[str, ...]] = set()
    wrong: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False, include_context=True):
        loc = item["loc"]
        if item["type"] == "extra_forbidden":
            key = tuple(str(part) for part in loc)
            near = nearest_key(key, kind)
            suggested.update({near} if near else set())
            hint = f"did you mean `{_dotted(near)}`?" if near else None
            unknown[key] = Problem(place_of(root, *loc), f"unknown key `{_dotted(key)}`", hint)
        else:
            # pydantic reports every member of a union below the value it is about.
            depth = find_node(root, loc).depth + (item["type"] == "missing")
            wrong.setdefault(loc[:depth], []).append(dict(item))
    problems = list(unknown.values())
    for loc, items in wrong.items():
        if items[0]["type"] == "missing" and suggested & {loc, ("extends",)}:
            continue  # the misspelled key above is this one, or would bring it
        problems.append(_wrong(root, loc, items, kind))
    return problems


def _wrong(
    root: yaml.Mapping,
    loc: tuple[str | int, ...],
    items: list[dict[str, Any]],
    kind: type[BaseModel],
) -> Problem:
    node, place, _ = find_node(root, loc)
    name = f"`{_dotted(loc)}`"
    if items[0]["type"] == "missing":
        hint = "start from a shipped recipe with `extends: quickstart`"
        is_section = len(loc) == 1 and kind is Recipe
        return Problem(str(place), f"{name} is missing", hint if is_section else None)
    if error := next((x["ctx"]["error"] for x in items if x["type"] == "value_error"), None):
        if isinstance(error, WrongKey):
            return Problem(place_of(root, *loc, error.key), str(error))
        return Problem(str(place), f"{name}: {error}")
    if kind is Recipe and loc == ("mesh",):  # its shorthand, which `load.py` writes out
        items = [*items, {"type": "literal_error", "ctx": {"expected": "'auto'"}, "input": None}]
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    given = yaml.plain(node) if node is not None else items[0]["input"]
    noun = "the text " if isinstance(given, str) and "text" not in expected else ""
    text = {dict: "a section", list: "a list"}.get(type(given), f"{noun}`{shown(given)}`")
    return Problem(str(place), f"{name} must be {expected}, not {text}", _rewrite(given, items))


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    "int_parsing_size": "a whole number",
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "`true` or `false`"),
    "string_type": "text",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    **dict.fromkeys(("tuple_type", "list_type"), "a list such as `[1, 2]`"),
    **dict.fromkeys(("model_type", "model_attributes_type"), "a section of `key: value` lines"),
    "dict_type": "a section of `key: value` lines",
    "too_short": "not empty",
}
"""what was expected, by pydantic's name of the mistake."""


def _expected(item: dict[str, Any]) -> str:
    ctx = item.get("ctx", {})
    if item["type"] == "literal_error":
        return str(ctx["expected"]).replace("'", "`")
    if item["type"] not in _EXPECTED:
        return str(item["msg"]).removeprefix("Input should be ")
    limits = {
        k: f"{v:,}" if isinstance(v, int) else f"{v:g}" for k, v in ctx.items() if len(k) == 2
    }
    return _EXPECTED[item["type"]].format(**limits)


def _rewrite(given: Any, items: list[dict[str, Any]]) -> str | None:
    """What to write instead, when a value of the right kind is recognisable."""
    kinds = {item["type"] for item in items}
    if "bool_type" in kinds and isinstance(given, str):
        if given.lower() in ("yes", "on", "y", "1"):
            return "write `true`"
        if given.lower() in ("no", "off", "n", "0"):
            return "write `false`"
    if kinds & {"int_type", "float_type"} and isinstance(given, str):
        text = given.strip().replace(",", "").replace(" ", "")
        sign = text[:1] if text[:1] in ("-", "+") else ""
        text = sign + (text.removeprefix(sign).lstrip("0") or "0")
        if isinstance(yaml.resolve(text), int | float) and not isinstance(yaml.resolve(text), bool):
            return f"write `{text}`, without quotes"
    if kinds & {"int_type", "int_from_float"} and isinstance(given, float) and given.is_integer():
        return f"write `{int(given)}`"
    if "tuple_type" in kinds and isinstance(given, str | int | float):
        return f"write `[{shown(given)}]`"
    if "string_type" in kinds and isinstance(given, int | float):
        return f'write `"{shown(given)}"`, with quotes'
    if "literal_error" in kinds and isinstance(given, str):
        options = re.findall(r"'([^']*)'", str(items[-1]["ctx"]["expected"]))
        return did_you_mean(given, options, cutoff=0.5)
    return None


def nearest_key(key: Sequence[str], kind: type[BaseModel]) -> tuple[str, ...] | None:
    """The known key that an unknown one probably stands for: the same name in another section, else
    a similar one in this section, else in any."""
    known = [*keys_of(kind), *([("extends",)] if kind is Recipe else [])]
    *section, last = key
    elsewhere = {path[-1]: path for path in reversed(known)}  # the first of each name
    if last in elsewhere:
        return elsewhere[last]
    here = {
        path[-1]: (*section, path[-1])
        for path in known
        if len(path) == len(key) and all(a in (b, "*") for a, b in zip(path, section, strict=False))
    }
    for names, cutoff in ((here, 0.6), (elsewhere, 0.75)):
        if near := nearest(last, names, cutoff):
            return names[near]
    return None


def keys_of(kind: type[BaseModel]) -> list[tuple[str, ...]]:
    """Every key of these settings as a path, sections included; `*` stands for chosen names."""
    found: list[tuple[str, ...]] = []
    for name, field in kind.model_fields.items():
        found.append((name,))
        for step, inner in _sections(field.annotation):
            found.extend((name, *step, *path) for path in keys_of(inner))
    return found


def _sections(annotation: Any) -> Iterable[tuple[tuple[str, ...], type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _sections(member)
    elif get_origin(annotation) in (dict, tuple, list):
        for member in get_args(annotation):
            for step, inner in _sections(member):
                yield ("*", *step), inner


class Located(NamedTuple):
    """What is at a path of keys: None where a key is absent, and the place of what is above."""

    node: yaml.Node | None
    place: yaml.Place
    depth: int
    """the number of keys of the path that are there."""


def find_node(root: yaml.Mapping, loc: Sequence[str | int]) -> Located:
    """The node at a path of keys and indices, and the place of its key."""
    node: yaml.Node = root
    place = root.place
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.Mapping) and part in node.entries:
            place = node.keys[str(part)]
            node = node.entries[str(part)]
        elif isinstance(node, yaml.Sequence) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            place = node.place
        else:
            return Located(None, place, depth)
    return Located(node, place, len(loc))


def place_of(root: yaml.Mapping, *loc: str | int) -> str:
    """`file:line` of the key at a path of keys, or of the nearest section above an absent one."""
    return str(find_node(root, loc).place)


def _dotted(loc: Iterable[str | int]) -> str:
    return shown(".".join(str(part) for part in loc))
