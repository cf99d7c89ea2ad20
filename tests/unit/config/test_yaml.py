"""Plain data only: what is refused in a YAML file, and what an unquoted scalar means."""

import resource
import time

import pytest

from glamcli.config import yaml
from glamcli.errors import RecipeError


def read(tmp_path, data):
    path = tmp_path / "my.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return yaml.read_tree(path, "my.yaml")


def refusal(tmp_path, data):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, data)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("1_000_000", 1_000_000),
        ("3e4", 30_000),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1e+3", 1000),
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        ("1.5", 1.5),
        ("2.0", 2.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("1_000.5", 1000.5),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_with_one_reading_are_values(text, value):
    found = yaml.resolve(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "no", "on", "off", "y", "n", "tRue", "nULL", "None"),
        *("010", "-01", "00", "0x1f", "0o17", "0b1", "1__0", "_1", "1_", "1,000", "1 000"),
        *("12:30", "12:30:45", "2024-01-31", ".nan", ".inf", "-.inf", "nan", "inf", "Infinity"),
        *("1e999", "1e-", "e5", ".", "-", "1.2.3", "١٢", "9" * 70),
    ],
)
def test_scalars_with_two_readings_stay_text(text):
    assert yaml.resolve(text) == text


def test_an_exponent_with_a_whole_value_is_whole_only_where_floats_are_exact():
    assert yaml.resolve("1e15") == 10**15
    assert isinstance(yaml.resolve("1e15"), int)
    assert isinstance(yaml.resolve("1e300"), float)


def test_quoted_scalars_are_text():
    root = yaml.parse("a: '1'\nb: \"true\"\nc: ''\n", "x")
    assert yaml.plain(root) == {"a": "1", "b": "true", "c": ""}


def test_every_key_and_value_knows_its_line(tmp_path):
    root = read(tmp_path, "# about\na: 1\n\nb:\n  c: [1,\n    2]\n")
    assert str(root.keys["b"]) == "my.yaml:4"
    inner = root.entries["b"]
    assert str(inner.keys["c"]) == "my.yaml:5"
    assert [item.place.line for item in inner.entries["c"].items] == [5, 6]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", "my.yaml:3: `a` is given twice, first at my.yaml:1"),
        ("s:\n  a: 1\n  a: 1\n", "my.yaml:3: `a` is given twice, first at my.yaml:2"),
        ('{"a": 1, "a": 2}', "my.yaml:1: `a` is given twice, first at my.yaml:1"),
        ("a: &x 1\n", "my.yaml:1: anchors and aliases are not allowed"),
        ("a: 1\nb: *a\n", "my.yaml:2: anchors and aliases are not allowed"),
        ("a: !!python/name:os.x 1\n", "my.yaml:1: tags are not allowed"),
        ("a: !!str 1\n", "my.yaml:1: tags are not allowed"),
        ("a: !mine 1\n", "my.yaml:1: tags are not allowed"),
        ("%YAML 1.1\n---\na: 1\n", "directives are not allowed"),
        ("a: 1\n---\nb: 2\n", "my.yaml:2: a second document starts here"),
        ("[1]: 2\n", "my.yaml:1: a key must be text"),
        ("? {a: 1}\n: 2\n", "my.yaml:1: a key must be text"),
        ("- 1\n- 2\n", "my.yaml:1: expected `key: value` lines at the top of the file"),
        ("just text\n", "my.yaml:1: expected `key: value` lines at the top of the file"),
        ("a: [1\nb: 2\n", "my.yaml:2:"),
        ("a: 'x\n", "my.yaml:2:"),
        ("a: b: c\n", "my.yaml:1: mapping values are not allowed here"),
        ("a:\n\t- b\n", "my.yaml:2:"),
        ('a: "\\e[31m"\n', "my.yaml:1: character U+001B is not allowed"),
        ('a: "\\ud800"\n', "my.yaml:1: character U+D800 is not allowed"),
        ('a: "\\UFFFFFFFF"\n', "my.yaml"),
    ],
)
def test_everything_but_plain_data_is_refused_with_its_line(tmp_path, data, what):
    assert what in refusal(tmp_path, data).what


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"a: caf\xe9\n", 6),
        ("a: 1\n".encode("utf-16"), 0),
        (b"\xef\xbb\xbfa: \xff", 6),
        (b"a: 1\nb: \x00\n", 8),
        (b"a: \x1b[31mred\n", 3),
        ("a: é\u202etxt\n".encode(), 5),
        ("a: b\u2028c\n".encode(), 4),
        (b"a: \xc2\x85\n", 3),
    ],
)
def test_bad_bytes_are_named_by_offset(tmp_path, data, offset):
    error = refusal(tmp_path, data)
    assert f"offset {offset}" in error.what
    assert error.what.isprintable()


def test_byte_order_mark_and_line_ends_of_other_systems_are_fine(tmp_path):
    root = read(tmp_path, b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")
    assert yaml.plain(root) == {"a": 1, "b": {"c": "x"}}
    assert str(root.keys["b"]) == "my.yaml:2"


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    assert read(tmp_path, "# nothing\n").entries == {}
    assert read(tmp_path, "").entries == {}


def test_depth_is_limited(tmp_path):
    deepest = "[" * (yaml.MAX_DEPTH - 1) + "]" * (yaml.MAX_DEPTH - 1)
    assert read(tmp_path, f"a: {deepest}\n").entries
    assert "levels deep" in refusal(tmp_path, f"a: [{deepest}]\n").what


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "data",
    [BOMB, "a: " + "[" * 20_000, b"a: " + b"x" * 100_000_000],
    ids=["aliases", "nesting", "size"],
)
def test_bombs_are_refused_fast_and_in_little_memory(tmp_path, data):
    path = tmp_path / "bomb.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    del data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(RecipeError):
        yaml.read_tree(path, "bomb.yaml")
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_folders_missing_files_and_pipes_are_no_recipes(tmp_path):
    for name, what in ((".", "is a folder"), ("none.yaml", "no such file"), ("/dev/null", "no")):
        with pytest.raises(RecipeError, match=what):
            yaml.read_tree(tmp_path / name, "shown")


def test_shown_values_are_one_safe_line():
    assert yaml.shown("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert yaml.shown("gs://user:secret@host/x") == "gs://***@host/x"
    assert len(yaml.shown("x" * 1000)) <= 80
    assert (yaml.shown(None), yaml.shown(True), yaml.shown(3)) == ("null", "true", "3")
