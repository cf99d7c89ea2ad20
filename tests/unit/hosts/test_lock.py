"""A run folder has one living owner."""

import json
import os
import socket
import subprocess
import sys

import pytest

from glamcli.errors import CheckpointError
from glamcli.hosts.lock import NAME, locked


def held_by(folder, **holder):
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps({"host": socket.gethostname(), **holder}))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_living_holder_is_named_and_kept(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass


def test_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    held_by(tmp_path, pid=dead_pid(), started="1")
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_process_number_given_to_somebody_else_does_not_hold(tmp_path):
    held_by(tmp_path, pid=os.getpid(), started="1")
    with locked(tmp_path):
        pass


def test_death_on_another_host_cannot_be_known(tmp_path):
    held_by(tmp_path, pid=dead_pid(), host="elsewhere.example")
    with pytest.raises(CheckpointError, match=r"on elsewhere\.example") as caught, locked(tmp_path):
        pass
    assert "delete" in str(caught.value.hint)


def test_a_half_written_lock_holds_nothing(tmp_path):
    (tmp_path / NAME).write_text('{"host": "a')
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write to the run folder"),
        locked(tmp_path / "file" / "run"),
    ):
        pass
