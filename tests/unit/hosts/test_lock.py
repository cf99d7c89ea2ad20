"""A run folder has one living owner."""

import os
import subprocess
import sys

import pytest

from glamcli.errors import CheckpointError
from glamcli.hosts.lock import NAME, hold, locked

HOLDS = """
import sys, time
from pathlib import Path
from glamcli.hosts.lock import locked
with locked(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_living_holder_is_named_and_kept(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"5", b"", b"\xff\xfe", b"process 1 on x\x1b[2J", b"p" * 10**6]
)
def test_a_holder_whose_name_cannot_be_read_is_another_process(tmp_path, content):
    with locked(tmp_path):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"in use by another process$"):
            locked(tmp_path).__enter__()


def test_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on"),
            locked(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / NAME).read_text()


def test_what_an_older_version_or_a_full_disk_left_holds_nothing(tmp_path):
    (tmp_path / NAME).write_text('{"host": "elsewhere", "pid": 1')
    with locked(tmp_path):
        pass


def test_a_process_that_waits_says_for_whom_once(tmp_path):
    said = []
    first = hold(tmp_path / "lock", said.append)

    def occupied(holder):
        said.append(holder)
        first.close()

    hold(tmp_path / "lock", occupied).close()
    assert [text.split(" on ")[0] for text in said] == [f"process {os.getpid()}"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write to the run folder"),
        locked(tmp_path / "file" / "run"),
    ):
        pass
