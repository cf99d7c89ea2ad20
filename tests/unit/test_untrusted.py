"""Files that may hold anything: no device, no pipe, no more than asked for, JSON that is data."""

import os
from dataclasses import dataclass

import pytest

from glamcli.untrusted import parse_as, parse_json, read_file


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    name: str
    parts: dict[str, Inner]
    share: float | None = None


def test_a_regular_file_is_read_whole_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", max_bytes=3) == b"123"


def test_a_file_above_the_limit_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_file(tmp_path / "file", max_bytes=3)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "pipe", "."])
def test_what_is_no_file_is_refused_at_once(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").symlink_to(target)
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        read_file(tmp_path / "file")


def test_json_may_begin_with_a_byte_order_mark():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == parse_json('{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 5000, "a number is too long"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b'{"a": ', "Expecting value"),
    ],
)
def test_what_is_no_json_is_a_value_error_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(data)


def test_a_value_of_a_type_is_read_with_defaults_and_without_other_keys():
    data = b'{"name": "a", "parts": {"b": {"sizes": [1, 2]}}, "more": 1}'
    assert parse_as(Outer, data) == Outer("a", {"b": Inner((1, 2))})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"parts": {}}', "`name`: field required"),
        (b'{"name": 1, "parts": {}}', "`name`: input should be a valid string"),
        (b'{"name": "a", "parts": []}', "`parts`: "),
        (b'{"name": "a", "parts": {"b": {"sizes": [1, true]}}}', "`parts.b.sizes.1`: "),
        (b'{"name": "a", "parts": {"b": {"sizes": [1.5]}}}', "`parts.b.sizes.0`: "),
        (b'{"name": "a", "parts": {}, "share": "0.5"}', "`share`: input should be a valid number"),
        (b"[1]", "object|dictionary|instance"),
        (b"[" * 100_000, "invalid JSON: recursion limit"),
        (b'{"name": "\xff", "parts": {}}', "invalid JSON|invalid unicode|UTF-8"),
    ],
)
def test_a_value_of_another_type_is_named(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_as(Outer, data)
