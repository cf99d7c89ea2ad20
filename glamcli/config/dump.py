"""Settings back as YAML: every value written out, deterministic, read back to the same settings."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from glamcli.config import yaml
from glamcli.config.schema import Recipe

# Text that needs no quotes: starts with a letter, has no mark that YAML knows.
_SAFE = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+(-][A-Za-z0-9_./+,;()-]*)*")

# What `yaml.resolve` reads as a number and editors read as text.
_UNDERSCORES = r"^[-+]?[0-9]+(_[0-9]+)+(\.[0-9]*)?$"


def dump(settings: BaseModel) -> str:
    """The settings as YAML, defaults included; loads back equal, without a parent."""
    return "".join(line + "\n" for line, _ in dump_lines(settings))


def dump_lines(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Lines of `dump`, each with the dotted key whose value it holds or starts."""
    indent = "  " * prefix.count(".")
    for name in type(settings).model_fields:
        value, key = getattr(settings, name), prefix + name
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:", None
            yield from dump_lines(value, key + ".")
        elif isinstance(value, tuple) and any(isinstance(i, str) and " " in i for i in value):
            yield f"{indent}{name}:", key
            for item in value:
                yield f"{indent}  - {as_yaml(item)}", None
        else:
            yield f"{indent}{name}: {as_yaml(value)}", key


def as_yaml(value: Any) -> str:
    """One value as it is written in a recipe."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(as_yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(k)}: {as_yaml(v)}" for k, v in value.items()) + "}"
    assert isinstance(value, str), value
    if _SAFE.fullmatch(value) and isinstance(yaml.resolve(value), str):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(char) for char in quoted)


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file for editors: nothing is required, for a file may extend."""
    schema = _loosen(Recipe.model_json_schema())
    sections = schema["$defs"]
    for settings in (schema, *sections.values()):
        for field in settings["properties"].values():
            if "$ref" in field and "default" in field:  # `null` drops what the parent says
                sections[field["$ref"].rpartition("/")[2]]["type"] = ["object", "null"]
    sections["Mesh"] |= {
        "type": ["object", "null", "string"],
        "pattern": "^auto$",
        "patternErrorMessage": "must be `auto` or a section",
        "examples": ["auto"],
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    extends = {
        "type": "string",
        "description": "the one recipe this one is based on: a shipped name, or a path relative "
        "to this file",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return schema


def _loosen(node: Any) -> Any:
    """The schema without what a partial file does not need, and with errors that help."""
    if isinstance(node, list):
        return [_loosen(item) for item in node]
    if not isinstance(node, dict):
        return node
    # Keys of recipes hold dicts, those of the schema do not.
    noise = {"required": list, "title": str}
    out = {
        key: _loosen(value)
        for key, value in node.items()
        if key not in noise or not isinstance(value, noise[key])
    }
    if out.get("type") in ("integer", "number"):
        message = {"integer": "must be a whole number", "number": "must be a number"}[out["type"]]
        out |= {"type": [out["type"], "string"], "pattern": _UNDERSCORES}
        out["patternErrorMessage"] = message  # VS Code's YAML server shows it
    return out | _merged(out.pop("anyOf")) if "anyOf" in out else out


def _merged(options: list[dict[str, Any]]) -> dict[str, Any]:
    """Alternatives as one schema of several types: of alternatives, editors report the mistake in
    one, which is mostly "is not of type 'null'"."""
    merged: dict[str, Any] = {"type": []}
    for option in options:
        if (text := option.get("const")) is not None:
            pattern, message = merged["pattern"], merged["patternErrorMessage"]
            option = {
                "pattern": f"{pattern}|^{text}$",
                "patternErrorMessage": f"{message} or `{text}`",
            }
        types = option.get("type", [])
        types = merged["type"] + (types if isinstance(types, list) else [types])
        merged |= {**option, "type": types}
    if "$ref" in merged:  # the section says which types it has
        del merged["type"]
    return merged
