"""Text with fields of an item filled in: `{field}`, `{a.b}`, `{list.0}`, `{field|filter:argument}`.

There is nothing to execute in a template: a hole names a field by a dotted path (numbers index
lists, `*` is every entry of one) and passes it through the filters below. `{{` and `}}` are literal
braces. Task files are checked when they are read, so that a mistake is reported with its line.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from glamcli.config.nearest import did_you_mean
from glamcli.errors import DataError

_HOLE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PATH = re.compile(r"[A-Za-z_]\w*(\.(\w+|\*))*\Z")
_ALL = ("all", "all_if_any")
"""Filters of a template that is one hole: every entry of a list (or the value itself), and the
same, or nothing, of a field that an item need not have."""
_SPREAD = re.compile(r"\{([A-Za-z_]\w*(?:\.(?:\w+|\*))*)\|(all|all_if_any)\}\Z")


def _last_word(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def _but_last_word(text: str) -> str:
    return text.rstrip().removesuffix(_last_word(text)).rstrip()


def _star_word(text: str, index: int) -> str:
    """The text with the letters of one of its words (counted from 0) between asterisks."""
    word = list(re.finditer(r"\S+", text))[index if index >= 0 else len(text)]
    core = re.search(r"\w(.*\w)?", word.group()) or re.search(r".*", word.group())
    assert core is not None
    start, end = word.start() + core.start(), word.start() + core.end()
    return f"{text[:start]}*{text[start:end]}*{text[end:]}"


_PLAIN: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "last_word": _last_word,
    "but_last_word": _but_last_word,
}
_WITH_ARGUMENT: dict[str, Callable[[str, str], str]] = {
    "before": lambda text, mark: text.partition(mark)[0],
    "after": lambda text, mark: text.partition(mark)[2],
    "drop_end": str.removesuffix,
    "map": lambda text, pairs: dict(pair.split("=", 1) for pair in pairs.split(","))[text],
    "replace": lambda text, pair: text.replace(pair.split("=", 1)[0], pair.split("=", 1)[1]),
}
# These take the field that holds a number: `{text|upto:pronoun_start}`.
_WITH_INDEX: dict[str, Callable[[str, int], str]] = {
    "upto": lambda text, index: text[:index],
    "from": lambda text, index: text[index:],
    "star_word": _star_word,
}

_Part = str | tuple[str, tuple[tuple[str, str | None], ...]]


def look_up(fields: Mapping[str, Any], path: str, place: str | None) -> Any:
    """The value at a dotted path of an item; an absent one is None without a `place`.

    Raises:
        DataError: the item has no such field; `place` (file:line) is named.
    """
    try:
        return _walk(fields, path.split("."))
    except KeyError:
        if place is None:
            return None
        known = ", ".join(f"`{name}`" for name in fields)
        raise DataError(
            f"{place}: no field `{path}` in this item", hint=f"it has {known}"
        ) from None


def _walk(value: Any, keys: Sequence[str]) -> Any:
    for number, key in enumerate(keys):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif _is_list(value) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif _is_list(value) and key == "*":
            return [_walk(each, keys[number + 1 :]) for each in value]
        else:
            raise KeyError(key)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


@lru_cache(maxsize=4096)
def _parse(template: str) -> tuple[_Part, ...]:
    """Literal pieces and holes of a template.

    Raises:
        ValueError: with the reason, when the template cannot be read.
    """
    parts: list[_Part] = []
    end = 0
    for match in _HOLE.finditer(template):
        parts.append(template[end : match.start()])
        end = match.end()
        found = match.group()
        if found in ("{{", "}}"):
            parts.append(found[0])
        elif match.group(1) is None:
            raise ValueError(f"single `{found}` in template; write `{found * 2}` for the character")
        else:
            path, *filters = match.group(1).split("|")
            parts.append((_checked_path(path), tuple(map(_filter, filters))))
    parts.append(template[end:])
    return tuple(part for part in parts if part)


def _filter(text: str) -> tuple[str, str | None]:
    name, colon, argument = text.partition(":")
    known = [*_PLAIN, *_WITH_ARGUMENT, *_WITH_INDEX]
    if name in _ALL:
        raise ValueError(f"filter `{name}` must be used alone, as in `{{answers|{name}}}`")
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"unknown filter `{name}`" + (f"; {hint}" if hint else ""))
    if bool(colon) == (name in _PLAIN):
        raise ValueError(f"filter `{name}` takes {'no' if colon else 'an'} argument")
    if name == "map" and not all("=" in pair for pair in argument.split(",")):
        raise ValueError(f"filter `map` reads `from=to,from=to`, got `{argument}`")
    if name == "replace" and "=" not in argument:
        raise ValueError(f"filter `replace` reads `from=to`, got `{argument}`")
    if name in _WITH_INDEX:
        _checked_path(argument)
    return name, argument if colon else None


def paths(template: str) -> list[str]:
    """The field paths that a template reads of every item."""
    if spread := _SPREAD.match(template):
        return [spread.group(1)] if spread.group(2) == "all" else []
    holes = [part for part in _parse(template) if not isinstance(part, str)]
    indices = [each for _, filters in holes for name, each in filters if name in _WITH_INDEX]
    return [path for path, _ in holes] + [each for each in indices if each is not None]


def checked(text: str, *, is_path: bool | None = None) -> str:
    """The text itself, once it can be read as a dotted field path or as a template; None: as a
    template if there is a hole in it, else as a path.

    Raises:
        ValueError: with the reason, when it cannot.
    """
    if is_path or (is_path is None and "{" not in text):
        return _checked_path(text)
    if not _SPREAD.match(text):
        _parse(text)
    return text


def _checked_path(path: str) -> str:
    if not _PATH.match(path):
        raise ValueError(f"`{path}` is not a field path such as `question` or `answers.text.0`")
    return path


def render(template: str, fields: Mapping[str, Any], place: str) -> str:
    """The template with the fields of one item filled in.

    Raises:
        DataError: a field is missing, is not text or a number, or `map` does not know its value.
    """
    pieces = []
    for part in _parse(template):
        if isinstance(part, str):
            pieces.append(part)
            continue
        path, filters = part
        value = _as_text(look_up(fields, path, place), path, place)
        for name, argument in filters:
            value = _filtered(value, name, argument, fields, path, place)
        pieces.append(value)
    return "".join(pieces)


def _filtered(
    value: str, name: str, argument: str | None, fields: Mapping[str, Any], path: str, place: str
) -> str:
    if argument is None:
        return _PLAIN[name](value)
    if name in _WITH_INDEX:
        index = look_up(fields, argument, place)
        if not isinstance(index, int) or isinstance(index, bool):
            raise DataError(f"{place}: `{argument}` is not a whole number: {index}")
        try:
            return _WITH_INDEX[name](value, index)
        except IndexError:
            raise DataError(f"{place}: `{path}` has no word {index} (`{argument}`)") from None
    try:
        return _WITH_ARGUMENT[name](value, argument)
    except KeyError:
        raise DataError(f"{place}: `{path}` is `{value}`, not one of {argument}") from None


def _as_text(value: Any, path: str, place: str) -> str:
    """A field as text; numbers are written out, lists and mappings are refused."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{place}: `{path}` is {type(value).__name__}, not text")


def values(fields: Mapping[str, Any], source: str | Sequence[str], place: str) -> list[Any]:
    """Values of one item: a field holding a list (or one value), or a list of templates, of which
    `{field|all}` and `{field|all_if_any}` stand for every entry of a list."""
    if isinstance(source, str):
        value = look_up(fields, source, place)
        return list(value) if _is_list(value) else [value]
    found: list[Any] = []
    for each in source:
        if spread := _SPREAD.match(each):
            path, name = spread.groups()
            if name == "all" or look_up(fields, path, None) is not None:
                found += values(fields, path, place)
        else:
            found.append(render(each, fields, place))
    return found


def texts(fields: Mapping[str, Any], source: str | Sequence[str], place: str) -> tuple[str, ...]:
    """The same where every value has to be a text."""
    name = source if isinstance(source, str) else "a list"
    return tuple(_as_text(each, name, place) for each in values(fields, source, place))
