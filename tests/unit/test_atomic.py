"""Files are whole whoever writes them, and a failed write changes nothing."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glamcli import atomic
from glamcli.storage import is_url, place
from glamcli.untrusted import read_file


def test_writers_of_one_file_at_once_each_leave_a_whole_one(tmp_path):
    path = tmp_path / "folder" / "file"
    texts = [str(number) * 100_000 for number in range(8)]

    def write_and_read(text: str) -> str:
        atomic.write(path, text)
        return path.read_text()

    with ThreadPoolExecutor(len(texts)) as threads:
        found = set(threads.map(write_and_read, texts * 20))
    assert found <= set(texts)
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write(path, "old")

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        atomic.write(path, b"new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_and_bytes_are_as_given(tmp_path):
    atomic.write(tmp_path / "text", "é\n")
    atomic.write(tmp_path / "bytes", b"\xff\r\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\xff\r\n"


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "folder" / "link"
    target.write_text("old")
    link.parent.mkdir()
    link.symlink_to(Path("..") / "target")
    atomic.write(link, "new")
    assert not link.is_symlink()
    assert (link.read_text(), target.read_text()) == ("new", "old")


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stdout = tmp_path / "stdout"  # as /dev/stdout is
    stdout.symlink_to("/proc/self/fd/1")
    for path in (pipe, stdout, tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            atomic.write(path, "new")
    assert pipe.is_fifo()
    assert stdout.is_symlink()
    assert {*tmp_path.iterdir()} == {pipe, stdout}


def test_lines_are_in_a_file_at_once_and_in_a_bucket_now_and_then(bucket, tmp_path, monkeypatch):
    for path in (tmp_path / "a" / "lines", place(f"{bucket}/a/lines")):
        lines = atomic.Lines(path, b"head\n")
        lines.add(b"1\n")
        assert read_file(path) == (b"head\n" if is_url(path) else b"head\n1\n")
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_SECONDS_BETWEEN", -1.0)
            lines.add(b"2\n")
        assert read_file(path) == b"head\n1\n2\n"
        lines.add(b"3\n")
        lines.flush()
        assert read_file(path) == b"head\n1\n2\n3\n"
